"""Routing-weight sum: how much weight the router gives an expert."""

from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


def routing_weight(
    layer: ExpertLayer, statistics: LayerStatistics, *, seed: int = 0
) -> Float64[Tensor, " E"]:
    """``sum_x g_e(x)`` over the tokens that chose the expert, ``[E]``; g as the model applies it.

    Reference: the summed routing scores of He et al., arXiv:2406.02500 (Unified-MoE-Compression).
    """
    return statistics.routing_weight_sums.clone()
