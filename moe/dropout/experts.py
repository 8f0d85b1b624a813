"""Experts that are slices of one FFN, fast at every number of active experts."""

# T tokens, S choices (T * K), D hidden (model) width, E experts, I expert width, F = E * I, K active experts

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..weights import ExpertWeights
from .swiglu import weighted_swiglu

BREAK_EVEN = {"cpu": (0.77, 0.07), "cuda": (0.75, 0.0)}
"""Share of active experts from which all of them are computed densely, by device type: for experts whose gate
and up hold 2**19 numbers, and by how much it falls with each halving (small products are slow products).

Those of the CPU are fitted to inference in float32 (`benchmarks/dropout_speed.py`), where the dense way pays
earlier than in training; those of CUDA are an estimate, since no GPU was at hand. Others use the CPU's.
"""


def break_even_share(expert_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Share K / E from which the dense way is faster.

    Args:
        expert_size: Numbers in an expert's gate and up.
        device: Where it computes.
        dtype: In what it multiplies. On CPUs products of half precision are so fast that sorting the tokens
            costs more than it saves at any share.
    """
    if device.type == "cpu" and dtype.itemsize < 4:
        return 0.0
    share, slope = BREAK_EVEN.get(device.type, BREAK_EVEN["cpu"])
    return min(max(share + slope * (math.log2(expert_size) - 19), 0.35), 0.9)


class SlicedExperts(nn.Module):
    """E experts of width I whose tensors, laid side by side, are one FFN of width F = E * I.

    Two ways lead to the same sum of weighted experts. *Grouped*: tokens are sorted by expert, and two grouped
    matrix products compute the chosen experts only. *Dense*: one FFN of width F computes all experts, and
    each block of I hidden activations is multiplied by its routing weight, zero where the expert was not
    chosen, before the down projection. Dense products run at a higher rate, so above a measured share K / E
    (`break_even_share`) the second is faster.

    Attributes:
        gate_up_proj: ``[E, 2I, D]``, gate above up; or, without a gate, ``up_proj [E, I, D]``.
        down_proj: ``[E, I, D]``, one row a neuron, which makes both ways read it without a copy.
        gate_up_bias: ``[E, 2I]`` or ``None``; without a gate ``up_bias [E, I]``.
        break_even: Share K / E from which the dense way is taken; ``None`` for `break_even_share`'s.

    Args:
        num_experts: E.
        expert_width: I.
        hidden_size: D.
        activation: Of the gate, or of the up projection where there is no gate.
        has_gate: Whether the FFN is gated.
        has_bias: Whether gate and up have biases.
        like: A tensor whose device and dtype the new, uninitialised parameters take.
    """

    def __init__(
        self,
        num_experts: int,
        expert_width: int,
        hidden_size: int,
        activation: nn.Module,
        *,
        has_gate: bool,
        has_bias: bool,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.has_gate = has_gate
        self.has_bias = has_bias
        self.act_fn = activation
        self.break_even: float | None = None
        rows = 2 * expert_width if has_gate else expert_width
        name = "gate_up" if has_gate else "up"
        self.up_names = (f"{name}_proj", f"{name}_bias")
        self.register_parameter(f"{name}_proj", _new(like, num_experts, rows, hidden_size))
        self.register_parameter(f"{name}_bias", _new(like, num_experts, rows) if has_bias else None)
        self.down_proj = _new(like, num_experts, expert_width, hidden_size)

    def extra_repr(self) -> str:
        """Sizes."""
        num_experts, width, hidden = self.down_proj.shape
        return f"num_experts={num_experts}, expert_width={width}, hidden_size={hidden}"

    def expert(self, index: int) -> ExpertWeights:
        """Views of one expert."""
        up_EID, bias_EI = (getattr(self, name) for name in self.up_names)
        up, bias = up_EID.detach()[index], None if bias_EI is None else bias_EI.detach()[index]
        down = self.down_proj.detach()[index].T
        if not self.has_gate:
            return ExpertWeights(up=up, down=down, up_bias=bias)
        gate, up = up.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return ExpertWeights(up=up, down=down, gate=gate, up_bias=up_bias, gate_bias=gate_bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],
        routing_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Sum the chosen experts' outputs, each times its routing weight."""
        # The compiler traces torch's grouped product in bfloat16 only.
        is_untraceable = torch.compiler.is_compiling() and self.down_proj.dtype is not torch.bfloat16
        if is_untraceable or self.computes_densely(expert_ids.shape[1], hidden_states):
            return self.dense(hidden_states, expert_ids, routing_weights)
        return self.grouped(hidden_states, expert_ids, routing_weights)

    def computes_densely(self, num_active: int, hidden_states: Tensor) -> bool:
        """Whether the dense way is taken for that many active experts and such hidden states."""
        share = self.break_even
        if share is None:
            size = getattr(self, self.up_names[0])[0].numel()
            share = break_even_share(size, hidden_states.device, _compute_dtype(hidden_states))
        return num_active >= share * self.num_experts

    def dense(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute one FFN of width F and weigh its hidden activations by blocks."""
        up_EID, bias_EI = (getattr(self, name) for name in self.up_names)
        shape = len(hidden_TD), self.num_experts
        weights_TE = weights_TK.new_zeros(shape).scatter_add(1, ids_TK, weights_TK)
        bias_F = None if bias_EI is None else bias_EI.flatten()
        up_TEI = nn.functional.linear(hidden_TD, up_EID.flatten(0, 1), bias_F).view(*shape, up_EID.shape[1])
        hidden_TEI = self._activate(up_TEI, weights_TE[:, :, None])
        return hidden_TEI.flatten(1) @ self.down_proj.flatten(0, 1)

    def grouped(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sort the choices by expert and compute each expert on its own tokens."""
        up_EID, bias_EI = (getattr(self, name) for name in self.up_names)
        ids_S = ids_TK.flatten()
        order_S = ids_S.argsort()
        tokens_S = order_S // ids_TK.shape[1]
        ends_E = torch.bincount(ids_S, minlength=self.num_experts).cumsum(0).to(torch.int32)
        hidden_SD = hidden_TD.index_select(0, tokens_S)
        up_SI = _grouped_matmul(hidden_SD, up_EID.transpose(1, 2), ends_E)
        if bias_EI is not None:
            up_SI = up_SI + bias_EI.index_select(0, ids_S.index_select(0, order_S)).to(up_SI.dtype)
        weights_S = weights_TK.flatten().index_select(0, order_S)
        hidden_SI = self._activate(up_SI, weights_S[:, None])
        out_SD = _grouped_matmul(hidden_SI, self.down_proj, ends_E)
        return out_SD.new_zeros(hidden_TD.shape).index_add_(0, tokens_S, out_SD)

    def _activate(self, up: Tensor, weights: Tensor) -> Tensor:
        """Activation (of the gate), gate times up, times the routing weights."""
        weights = weights.to(up.dtype)
        if not self.has_gate:
            return self.act_fn(up) * weights
        if isinstance(self.act_fn, nn.SiLU | SiLUActivation) and not torch.compiler.is_compiling():
            return weighted_swiglu(up, weights)
        gate, up = up.chunk(2, dim=-1)
        return self.act_fn(gate) * up * weights


def _new(like: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))


def _grouped_matmul(rows_SA: Tensor, weights_EAB: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply rows, sorted by expert, by their expert's matrix; expert e's rows end at ``ends_E[e]``."""
    dtype = _compute_dtype(rows_SA)  # autocast knows nothing of grouped products
    rows_SA, weights_EAB = rows_SA.to(dtype), weights_EAB.to(dtype)
    if _has_grouped_product(rows_SA, weights_EAB):
        return nn.functional.grouped_mm(rows_SA, weights_EAB, offs=ends_E)
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    parts = zip(rows_SA.split(sizes), weights_EAB, strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


def _compute_dtype(rows: Tensor) -> torch.dtype:
    """In what a product with these rows is computed."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


def _has_grouped_product(rows_SA: Tensor, weights_EAB: Tensor) -> bool:
    """Whether torch's own takes these: not float64, and widths of a multiple of 16 bytes."""
    widths = weights_EAB.shape[1:]
    is_aligned = all(width * rows_SA.element_size() % 16 == 0 for width in widths)
    return is_aligned and rows_SA.dtype is not torch.float64
