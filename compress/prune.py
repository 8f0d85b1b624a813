"""Pruning: keep the experts of each layer that score best, with their rows of the router, drop the others."""

# E experts

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..moe.layer import ExpertLayer
from ..moe.statistics import LayerStatistics, RoutingStatistics
from .budget import choose_cores, share_experts
from .group_plan import finished_plan
from .layer_plan import keep_experts
from .plan import CompressionPlan, check_form
from .protection import super_experts, told
from .scores import NEEDS_NO_DATA, SCORES


def plan_pruning(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics | None,
    *,
    score: str,
    grouping: str = "uniform",
    form: str = "moekit",
    router: str = "slice",
    protect: bool = True,
    seed: int = 0,
    **budget: Any,
) -> CompressionPlan:
    """Plan to keep the experts that score best.

    Experts are not scaled afterwards: a router that renormalises its weights restores their sum by itself.

    Args:
        layers: ``expert_layers(model)``.
        statistics: Routing of calibration data; scores that read none (``NEEDS_NO_DATA``) also take None, and
            then no super expert is known.
        score: One of ``SCORES``.
        grouping: How many experts each layer keeps, one of ``SHARES``.
        form: ``moekit`` or ``stock``.
        router: ``slice`` drops the rows of the others; ``constant`` keeps them, and replaces each of the
            others by its mean output, which `apply_plan` finds.
        protect: Whether super experts are kept, whatever their score.
        seed: Of the score ``random``.
        **budget: ``experts`` or ``ratio``, ``exclude_layers`` and what else ``share_experts`` takes.

    Raises:
        ValueError: Numbers or options out of range, or at odds with each other or with a layer's router.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is not one of {', '.join(SCORES)}")
    if statistics is None and score not in NEEDS_NO_DATA:
        raise ValueError(
            f"score={score!r} reads the routing of calibration data, which is missing; record it, or take "
            f"one of {', '.join(sorted(NEEDS_NO_DATA))}"
        )

    def by_name(layer: ExpertLayer, known: LayerStatistics | None) -> torch.Tensor:
        return SCORES[score](layer, known, seed=seed)

    options = {"grouping": grouping, "form": form, "router": router, "protect": protect, "seed": seed}
    return plan_by_score(layers, statistics, by_name, method=score, **options, **budget)


def plan_by_score(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics | None,
    score: Callable[[ExpertLayer, LayerStatistics | None], torch.Tensor],
    *,
    method: str,
    grouping: str,
    form: str,
    router: str,
    protect: bool,
    seed: int,
    **budget: Any,
) -> CompressionPlan:
    """Plan to keep the experts of the highest score, whatever that is; see `plan_pruning`.

    Args:
        layers: All MoE layers.
        statistics: Or None, if the score reads none.
        score: From a layer and what is known of it to ``[E]``, higher to keep.
        method: Its name.
        grouping: See `plan_pruning`, as for the others.
        form: ``moekit`` or ``stock``.
        router: ``slice`` or ``constant``.
        protect: Whether super experts are kept.
        seed: For the record.
        **budget: See `plan_pruning`.

    Raises:
        ValueError: See `plan_pruning`.
    """
    if router not in ("slice", "constant"):
        raise ValueError(
            f"router={router!r} does not go with experts that are dropped: use 'slice', or 'constant' to put "
            "their mean outputs in their place"
        )
    check_form(form, router)
    shares = share_experts(layers, statistics, grouping=grouping, **budget)
    protected = super_experts(statistics) if protect and statistics is not None else {}
    planned, notes = [], []
    for index, (layer, num_kept) in enumerate(zip(layers, shares.num_kept, strict=True)):
        if index in shares.untouched:
            planned.append(keep_experts(layer.name, layer.num_experts, layer.top_k))
            continue
        known = None if statistics is None else statistics.layers[layer.name]
        if known is not None and method not in NEEDS_NO_DATA and (unseen := known.too_few(1)):
            notes.append(f"layer {layer.name!r}: no token chose the experts {unseen}; they count as 0")
        kept = choose_cores(
            layer, score(layer, known), num_kept, router, protected=protected.get(layer.name, ())
        )
        planned.append(keep_experts(layer.name, layer.num_experts, layer.top_k, kept))
    settings = {"grouping": grouping, "protected": told(protected), "seed": seed}
    return finished_plan(
        layers, planned, shares, settings, method=method, form=form, router=router, notes=notes
    )
