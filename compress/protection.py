"""Super experts: a few whose outputs dwarf all others, and without which a model says nothing."""

from ..moe.statistics import RoutingStatistics

MIN_EXPERTS = 200
"""Of a model, below which the largest is no outlier but only the largest."""


def super_experts(statistics: RoutingStatistics) -> dict[str, list[int]]:
    """Experts that are never dropped or averaged, by layer name.

    See `RoutingStatistics.super_experts`; there are none in a model of fewer than 200 experts, where some
    expert always has the largest outputs.

    Args:
        statistics: Routing of calibration data.

    Reference: Su et al., Unveiling Super Experts, arXiv:2507.23279: without 3 of the 6,144 experts of
    Qwen3-30B its average falls from 69.4 to 4.0.
    """
    num_experts = sum(layer.num_experts for layer in statistics.layers.values())
    return statistics.super_experts() if num_experts >= MIN_EXPERTS else {}


def told(protected: dict[str, list[int]]) -> list[str]:
    """Protected experts as a plan's settings name them."""
    return [f"{name} expert {expert}" for name, experts in protected.items() for expert in experts]
