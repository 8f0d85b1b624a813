"""REAP, router-weighted expert activation pruning: how much an expert adds when it is asked."""

from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


def reap(layer: ExpertLayer, statistics: LayerStatistics, *, seed: int = 0) -> Float64[Tensor, " E"]:
    """``mean_x g_e(x) ||f_e(x)||`` over the tokens that chose the expert, ``[E]``; 0 where none did.

    A conditional mean, so that rare experts are not punished for being rare. g is what the model applies:
    renormalised, scaled, sigmoid or softmax, as its router does.

    Reference: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    arXiv:2510.13999.

    *Departs from the code*: it takes a softmax for the weights of sigmoid routers too.
    """
    return statistics.gated_output_norm_sums / statistics.counts.clamp(min=1)
