"""Experts that say the same to every token: what is left of one that was replaced by its mean output.

The router keeps its row for such an expert; choosing it adds its row of a small table, times its weight, and
the choice counts for nothing in the family's own forward. A table of C experts of width D takes C x D
numbers, a few thousandths of what they were.
"""

# T tokens, K active experts, M experts with weights, C constant ones, D hidden width

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .layer import ExpertLayer
from .redirect import has_constants
from .storage import write_experts


class _ConstantExperts:
    """What is put before the forward of a family's experts; mixed into its class."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the family's own; ids from M on are rows of the table."""
        num_experts, table_CD = self.num_experts, self.constant_outputs
        is_constant_TK = top_k_index >= num_experts
        shares_TK = top_k_weights.masked_fill(~is_constant_TK, 0)
        shares_TC = shares_TK.new_zeros(len(shares_TK), len(table_CD))
        shares_TC = shares_TC.scatter_add(1, (top_k_index - num_experts).clamp(min=0), shares_TK)
        # A weight of 0, since the masks by which Transformers passes over a choice cost more than it does.
        ids_TK = top_k_index.masked_fill(is_constant_TK, 0)
        weights_TK = top_k_weights.masked_fill(is_constant_TK, 0)
        outputs = super().forward(hidden_states, ids_TK, weights_TK)  # pyright: ignore[reportAttributeAccessIssue]
        said_TD = shares_TC.to(outputs.dtype) @ table_CD.to(outputs.dtype)
        return outputs + said_TD.view(outputs.shape)


@cache
def _constant_class(family: type[nn.Module]) -> type[nn.Module]:
    return type(f"Constant{family.__name__}", (_ConstantExperts, family), {})


def check_constants(layer: ExpertLayer) -> None:
    """Refuse layers that cannot hold constant experts.

    Raises:
        ValueError: The experts are not of the kind that transformers fuses, or are normalised afterwards, or
            some are constant already.
    """
    module = layer.experts_module
    kind = type(module).__name__
    if not (hasattr(module, "has_gate") and hasattr(module, "_is_expert_parallel")):
        raise ValueError(
            f"the experts of layer {layer.name!r} are not fused as transformers fuses them ({kind}), so none "
            "can be replaced by a constant; use router='slice'"
        )
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "zero_expert_num", 0):
        raise ValueError(
            f"layer {layer.name!r} ({kind}) normalises what experts say, or has experts without weights; "
            "none can be replaced by a constant; use router='slice'"
        )
    if has_constants(module):
        raise ValueError(f"layer {layer.name!r} has constant experts already; start from the original model")


@torch.no_grad()
def keep_weights(layer: ExpertLayer, keep: Sequence[int]) -> None:
    """Keep the weights of some experts; the others await `set_constants`, in ascending order.

    Args:
        layer: Not merged.
        keep: Experts, ascending.

    Raises:
        ValueError: See `check_constants`.
    """
    check_constants(layer)
    num_experts, experts = layer.num_experts, layer.experts()
    write_experts(layer.storage, [experts[e] for e in keep])
    layer.set_expert_map(constant_map(num_experts, keep))


def constant_map(num_experts: int, keep: Sequence[int]) -> list[int]:
    """For each expert its place among those with weights, or behind them among the constant ones."""
    places = {expert: place for place, expert in enumerate(keep)}
    others = [expert for expert in range(num_experts) if expert not in places]
    places |= {expert: len(keep) + place for place, expert in enumerate(others)}
    return [places[expert] for expert in range(num_experts)]


def num_constants(layer: ExpertLayer) -> int:
    """C of a layer."""
    table_CD = layer.experts_module._buffers.get("constant_outputs")
    return 0 if table_CD is None else len(table_CD)


def set_constants(layer: ExpertLayer, constants_CD: Float[Tensor, "C D"]) -> None:
    """Let a layer that `keep_weights` was called on say these for its other experts.

    Args:
        layer: Whose experts may have become low-rank in between, but not later.
        constants_CD: What they say; becomes of the experts' dtype.
    """
    module = layer.experts_module
    parameter = next(module.parameters())
    module.register_buffer("constant_outputs", constants_CD.to(parameter.device, parameter.dtype))
    module.__class__ = _constant_class(type(module))
