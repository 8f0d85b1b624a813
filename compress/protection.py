"""Super experts: a few whose outputs dwarf all others, and without which a model says nothing."""

from ..moe.statistics import RoutingStatistics

OUTLIER = 10.0
"""Times the usual output of its layer that a super expert's is at least."""


def super_experts(statistics: RoutingStatistics) -> dict[str, list[int]]:
    """Experts that are never dropped or averaged, by layer name.

    An expert is one if the largest norm of its outputs is more than 10 times the median of its layer, over
    the experts that some token chose, and a tenth of the layer's largest.

    Args:
        statistics: Routing of calibration data.

    Reference: Su et al., Unveiling Super Experts, arXiv:2507.23279: without 3 of the 6,144 experts of
    Qwen3-30B its average falls from 69.4 to 4.0.

    *Departs from the paper*, which takes what lies above the 99.5th percentile and a tenth of the maximum of
    all experts of the model, in layers where massive activations arise. That some expert has the largest
    outputs is true of every model (of two small trained ones they are at most 8 times the median, and can go
    without harm), and of 200 experts or fewer one alone lies above that percentile. And a layer is judged by
    itself, so the answer is the same where layers are read one at a time. The size of an output is its norm
    over D, not its largest entry.
    """
    found = {}
    for name, layer in statistics.layers.items():
        norms_E = layer.max_output_norm
        if not (norms_E > 0).any():
            continue
        usual, largest = norms_E[norms_E > 0].median(), norms_E.max()
        is_outlier_E = (norms_E > OUTLIER * usual) & (norms_E > largest / 10)
        if outliers := is_outlier_E.nonzero().flatten().tolist():
            found[name] = outliers
    return found


def told(protected: dict[str, list[int]]) -> list[str]:
    """Protected experts as a plan's settings name them."""
    return [f"{name} expert {expert}" for name, experts in protected.items() for expert in experts]
