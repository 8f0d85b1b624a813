"""Super experts: a few whose outputs dwarf all others, and without which a model says nothing."""

from ..moe.statistics import RoutingStatistics

OUTLIER = 10.0
"""Times the usual output of its layer that a super expert's is at least."""


def super_experts(statistics: RoutingStatistics) -> dict[str, list[int]]:
    """Experts that are never dropped or averaged, by layer name.

    An expert is one if the largest norm of its outputs is

    * above the 99.5th percentile of all experts and a tenth of the largest of all, as in
      `RoutingStatistics.super_experts`, and
    * more than 10 times the median of its layer, over the experts that some token chose: in a model without
      outliers some expert has the largest outputs too, and must not be taken for one. (Of two small trained
      models it is at most 8 times, and those experts can go without harm.)

    Where layers are planned one at a time, all experts are those of the layer. In fewer than 200 there is one
    at most.

    Args:
        statistics: Routing of calibration data.

    Reference: Su et al., Unveiling Super Experts, arXiv:2507.23279: without 3 of the 6,144 experts of
    Qwen3-30B its average falls from 69.4 to 4.0.

    *Departs from the paper*: the second condition stands for its choice of the layers in which massive
    activations arise.
    """
    found = {}
    for name, experts in statistics.super_experts().items():
        norms_E = statistics.layers[name].max_output_norm
        usual = norms_E[norms_E > 0].median()
        if outliers := [expert for expert in experts if norms_E[expert] > OUTLIER * usual]:
            found[name] = outliers
    return found


def told(protected: dict[str, list[int]]) -> list[str]:
    """Protected experts as a plan's settings name them."""
    return [f"{name} expert {expert}" for name, experts in protected.items() for expert in experts]
