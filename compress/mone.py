"""MoNE: experts that are rarely chosen and always say nearly the same are replaced by what they say."""

# E experts

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..moe.layer import ExpertLayer
from ..moe.statistics import LayerStatistics, RoutingStatistics
from .plan import CompressionPlan
from .prune import plan_by_score
from .scores.frequency import frequency


def plan_mone(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics,
    *,
    grouping: str = "uniform",
    form: str = "moekit",
    protect: bool = True,
    seed: int = 0,
    **budget: Any,
) -> CompressionPlan:
    """Plan to keep the experts of the largest ``frequency x deviation`` and to replace the others.

    The deviation of an expert is ``sqrt(sum_x |f(x) - mean f|^2 / (n - 1))`` over the n tokens that chose it,
    which the paper calls the output variance; what takes its place is their mean, which `apply_plan` finds.
    The router stays as it is.

    Args:
        layers: ``expert_layers(model)``.
        statistics: Routing of calibration data.
        grouping: How many experts each layer keeps, one of ``SHARES``.
        form: Only ``moekit`` holds constants.
        protect: Whether super experts are kept, whatever their score.
        seed: For the record.
        **budget: ``experts`` or ``ratio``, ``exclude_layers`` and what else ``share_experts`` takes.

    Raises:
        ValueError: Numbers or options out of range.

    Reference: Zhang et al., "MoNE: Replacing Redundant Experts with Lightweight Novices", arXiv:2507.00390.
    """

    def score(layer: ExpertLayer, known: LayerStatistics | None) -> Tensor:
        assert known is not None  # `statistics` are not
        return frequency(layer, known, seed=seed) * known.output_deviation

    return plan_by_score(
        layers,
        statistics,
        score,
        method="mone",
        router="constant",
        grouping=grouping,
        form=form,
        protect=protect,
        seed=seed,
        **budget,
    )
