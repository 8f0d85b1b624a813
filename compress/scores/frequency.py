"""Activation frequency: how often the router chooses an expert."""

from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


def frequency(layer: ExpertLayer, statistics: LayerStatistics, *, seed: int = 0) -> Float64[Tensor, " E"]:
    """``|X_e|``, the tokens that chose the expert, ``[E]``.

    Reference: pruning baseline of Li et al., "Merge, Then Compress" (ICLR 2024), section 4, arXiv:2310.01334.
    """
    return statistics.counts.double()
