"""EAN, expert activation norm: the summed size of what an expert says."""

from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


def ean(layer: ExpertLayer, statistics: LayerStatistics, *, seed: int = 0) -> Float64[Tensor, " E"]:
    """``sum_x ||f_e(x)||`` over the tokens that chose the expert, ``[E]``: frequency times `man`.

    Reference: a baseline of Lasby et al., "REAP the Experts", arXiv:2510.13999.
    """
    return statistics.output_norm_sums.clone()
