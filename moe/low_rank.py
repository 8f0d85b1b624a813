"""Experts whose matrices are ``W = U V + S``: a product of rank r and a few whole rows.

Both parts cost less memory and fewer multiplications than W, so a layer of them is smaller and, where r is
small enough, faster. The family's own activation, biases and routing stay.
"""

# E experts, S choices sorted by expert, T tokens, K active experts, O outputs, I inputs, R rank, N rows of S

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from .weights import ExpertWeights

UP, DOWN = "up_map", "down_map"
"""Names of the two maps in an experts module; the first is of gate and up projection together."""
GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""For which there are grouped kernels, of rows of a multiple of 16 bytes."""


class LowRankMap(nn.Module):
    """E linear maps ``W_e = U_e V_e + S_e``.

    Attributes:
        u: ``[E, O, R]``.
        v: ``[E, R, I]``.
        rows: ``[E, N, I]``, the rows of S that are not zero.
        row_index: ``[E, N]``, which rows they are; no number twice.
    """

    row_index: Tensor

    def __init__(
        self, num_experts: int, num_out: int, num_in: int, rank: int, num_rows: int, like: Tensor
    ) -> None:
        super().__init__()
        check_rank(rank, num_rows, num_out, num_in)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_empty(shape), requires_grad=like.requires_grad)

        self.u = empty(num_experts, num_out, rank)
        self.v = empty(num_experts, rank, num_in)
        self.rows = empty(num_experts, num_rows, num_in)
        index_N = torch.arange(num_rows, device=like.device)
        self.register_buffer("row_index", index_N.expand(num_experts, -1).clone())

    def dense(self, expert: int) -> Float[Tensor, "O I"]:
        """W of one expert, a new tensor."""
        weight_OI = self.u[expert] @ self.v[expert]
        return weight_OI.index_add(0, self.row_index[expert], self.rows[expert])

    def forward(
        self, inputs: Float[Tensor, "S I"], offsets: Int[Tensor, " E"], experts: Int[Tensor, " S"]
    ) -> Float[Tensor, "S O"]:
        """``W_e x`` of every row.

        Args:
            inputs: Rows, sorted by expert.
            offsets: Where the rows of each expert end, int32.
            experts: Of each row.
        """
        outputs_SO = grouped_linear(grouped_linear(inputs, self.v, offsets), self.u, offsets)
        if not self.rows.shape[1]:
            return outputs_SO
        return outputs_SO.scatter_add(1, self.row_index[experts], grouped_linear(inputs, self.rows, offsets))


def grouped_linear(
    inputs_SI: Float[Tensor, "S I"], weight_EOI: Float[Tensor, "E O I"], offsets: Int[Tensor, " E"]
) -> Float[Tensor, "S O"]:
    """``weight[e] x`` for rows sorted by expert."""
    size = inputs_SI.element_size()
    is_even = all(width * size % 16 == 0 for width in weight_EOI.shape[1:])
    if inputs_SI.dtype in GROUPED_TYPES and is_even and len(inputs_SI):
        return _grouped_linear(inputs_SI, weight_EOI, offsets)
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    parts = zip(inputs_SI.split(counts), weight_EOI, strict=True)
    return torch.cat([nn.functional.linear(part, weight) for part, weight in parts])


class _LowRankExperts:
    """What replaces the forward of a family's experts; mixed into its class."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the family's own: experts of each token, weighted and added."""
        num_experts, num_choices = len(getattr(self, UP).u), top_k_index.shape[1]
        experts_S, order_S = top_k_index.flatten().sort(stable=True)
        counts_E = torch.bincount(experts_S.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts]
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        if getattr(self, "_is_expert_parallel", False):  # choices of no expert stand at the end
            served = int(offsets_E[-1])
            experts_S, order_S = experts_S[:served], order_S[:served]
        tokens_S = order_S // num_choices
        inner = getattr(self, UP)(hidden_states[tokens_S], offsets_E, experts_S)
        if self.has_bias:
            inner = inner + getattr(self, f"{up_name(self)}_bias")[experts_S]
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outputs_SD = getattr(self, DOWN)(inner, offsets_E, experts_S)
        if self.has_bias:
            outputs_SD = outputs_SD + self.down_proj_bias[experts_S]
        if getattr(self, "has_post_expert_norm", False):
            outputs_SD = self.post_expert_norm(outputs_SD)
        weighted_SD = outputs_SD * top_k_weights.flatten()[order_S, None]
        summed = torch.zeros_like(hidden_states, dtype=weighted_SD.dtype)
        return summed.index_add(0, tokens_S, weighted_SD).to(hidden_states.dtype)


@cache
def _low_rank_class(family: type[nn.Module]) -> type[nn.Module]:
    return type(f"LowRank{family.__name__}", (_LowRankExperts, family), {})


def is_low_rank(module: nn.Module) -> bool:
    """Whether an experts module holds factors."""
    return isinstance(module, _LowRankExperts)


def up_name(module: Any) -> str:
    """Of the parameter of an experts module that enters its neurons."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def check_rank(rank: int, num_rows: int, num_out: int, num_in: int) -> None:
    """Refuse factors that no matrix of this size has.

    Raises:
        ValueError: A rank or a number of rows out of range.
    """
    if not 1 <= rank <= min(num_out, num_in):
        raise ValueError(f"rank {rank} is not between 1 and {min(num_out, num_in)} ({num_out} x {num_in})")
    if not 0 <= num_rows <= num_out:
        raise ValueError(f"{num_rows} rows are not between 0 and {num_out}")


def make_low_rank(module: Any, rank: int, num_rows: tuple[int, int], *, layer: str) -> None:
    """Let an experts module hold factors instead of matrices, with contents yet to be filled.

    Args:
        module: Of the kind that transformers fuses, with its matrices.
        rank: R of both maps.
        num_rows: N of the first map and of the second.
        layer: What messages call it.

    Raises:
        ValueError: Experts of another kind, or numbers out of range; nothing is changed then.
    """
    up = getattr(module, up_name(module), None) if hasattr(module, "has_gate") else None
    if up is None or is_low_rank(module):
        raise ValueError(
            f"the experts of layer {layer!r} cannot be low-rank: {type(module).__name__} is not one of the "
            "fused kinds of transformers, or is low-rank already"
        )
    maps = {}
    for name, weight, rows in ((UP, up, num_rows[0]), (DOWN, module.down_proj, num_rows[1])):
        num_experts, num_out, num_in = weight.mT.shape if module.is_transposed else weight.shape
        maps[name] = LowRankMap(num_experts, num_out, num_in, rank, rows, weight)
    delattr(module, up_name(module))
    del module.down_proj
    for name, made in maps.items():
        module.add_module(name, made)
    module.__class__ = _low_rank_class(type(module))
    module.eager_folds_choices = True


def low_rank_entry(module: nn.Module) -> dict[str, Any] | None:
    """What a config says of such a module; None for any other."""
    if not is_low_rank(module):
        return None
    up, down = (module.get_submodule(name) for name in (UP, DOWN))
    return {"rank": up.v.shape[1], "rows": [up.rows.shape[1], down.rows.shape[1]]}  # pyright: ignore


def check_rows(module: nn.Module, layer: str) -> None:
    """Refuse loaded maps whose rows of S are not rows of the matrices.

    Raises:
        ValueError: One is out of range, or twice in an expert.
    """
    for made in module.children() if is_low_rank(module) else ():
        if not isinstance(made, LowRankMap) or made.row_index.device.type == "meta":
            continue
        index_EN = made.row_index.sort(1).values
        is_repeated = (index_EN.diff(dim=1) == 0).any()
        if index_EN.numel() and (index_EN.min() < 0 or index_EN.max() >= made.u.shape[1] or is_repeated):
            raise ValueError(
                f"the checkpoint names rows that the matrices of layer {layer!r} do not have "
                f"({made.u.shape[1]} rows), or one twice; it is damaged"
            )


class LowRankStorage:
    """Reads the experts of such a module as dense ones, which are copies."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether it is such a module."""
        return is_low_rank(module)

    def __len__(self) -> int:
        return getattr(self.module, UP).u.shape[0]

    @torch.no_grad()
    def read(self, expert: int) -> ExpertWeights:
        """One expert, multiplied out; writing to it changes nothing."""
        module = self.module
        fused, down = getattr(module, UP).dense(expert), getattr(module, DOWN).dense(expert)
        gate, up = self._split(fused)
        if not module.has_bias:
            return ExpertWeights(up=up, down=down, gate=gate)
        gate_bias, up_bias = self._split(getattr(module, f"{up_name(module)}_bias").detach()[expert])
        return ExpertWeights(up, down, gate, up_bias, gate_bias, module.down_proj_bias.detach()[expert])

    def _split(self, fused: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.module.has_gate:
            return None, fused
        if getattr(self.module, "is_concatenated", True):
            gate, up = fused.chunk(2)
            return gate, up
        return fused[0::2], fused[1::2]

    def allocate(self, num_experts: int) -> None:
        """Refuse: experts are merged before they are factorised.

        Raises:
            ValueError: Always.
        """
        raise ValueError("low-rank experts cannot be merged or removed; start from the original model")
