"""MAN, mean activation norm: how much an expert says when it is asked."""

from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


def man(layer: ExpertLayer, statistics: LayerStatistics, *, seed: int = 0) -> Float64[Tensor, " E"]:
    """``mean_x ||f_e(x)||`` over the tokens that chose the expert, ``[E]``; 0 where none did.

    Neither use nor routing weight counts, which is meant for compression that knows no task.

    Reference: arXiv:2606.15716 (from its abstract).
    """
    return statistics.output_norm_sums / statistics.counts.clamp(min=1)
