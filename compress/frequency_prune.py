"""Frequency pruning: keep the most used experts of each layer, drop the others; the baseline of merging."""

from collections.abc import Collection, Sequence

from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from .budget import choose_cores, share_experts
from .layer_plan import keep_experts
from .plan import AlignmentRule, CompressionPlan, ModelIdentity


def plan_frequency(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics,
    *,
    experts: int | None = None,
    ratio: float | None = None,
    grouping: str = "uniform",
    form: str = "moekit",
    exclude_layers: Collection[int] = (),
) -> CompressionPlan:
    """Plan to keep the most used experts, with their rows of the router.

    Args:
        layers: As for ``plan_m_smoe``, like all other arguments.
        statistics: Routing of calibration data.
        experts: Experts to keep in each layer, on average for ``adaptive``; or ``ratio``.
        ratio: Share of the experts to keep, in (0, 1].
        grouping: ``adaptive`` or ``uniform`` numbers of experts over the layers.
        form: ``moekit`` or ``stock``.
        exclude_layers: Indices of layers that stay as they are.

    Raises:
        ValueError: Numbers or options out of range, or at odds with each other or with a layer's router.

    Reference: pruning baseline of Li et al., "Merge, Then Compress" (ICLR 2024), section 4, arXiv:2310.01334.
    """
    sizes = {"experts": experts, "ratio": ratio, "exclude_layers": sorted(exclude_layers)}
    budget = share_experts(layers, statistics, **sizes, grouping=grouping)  # pyright: ignore[reportArgumentType]
    planned = []
    for index, (layer, num_kept) in enumerate(zip(layers, budget.num_kept, strict=True)):
        keep = None
        if index not in budget.untouched:
            keep = choose_cores(layer, statistics.layers[layer.name].counts, num_kept, "slice")
        planned.append(keep_experts(layer.name, layer.num_experts, layer.top_k, keep))
    plan = CompressionPlan(
        model=ModelIdentity.of(layers),
        method="frequency",
        form=form,
        router="slice",
        alignment=AlignmentRule(method="none"),
        layers=tuple(planned),
        requested_experts=budget.requested,
        settings={**sizes, "grouping": grouping},
        notes=budget.notes,
    )
    plan.validate_against(layers)
    return plan
