"""Pruning: keep the experts of each layer that score best, with their rows of the router, drop the others."""

# E experts

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from .budget import choose_cores, share_experts
from .group_plan import finished_plan
from .layer_plan import LayerPlan, keep_experts
from .plan import CompressionPlan
from .protection import super_experts, told
from .scores import NEEDS_NO_DATA, SCORES


def plan_pruning(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics | None,
    *,
    score: str,
    grouping: str = "uniform",
    form: str = "moekit",
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
    shares = share_experts(layers, statistics, grouping=grouping, **budget)
    protected = super_experts(statistics) if protect and statistics is not None else {}
    planned, notes = [], []
    for index, (layer, num_kept) in enumerate(zip(layers, shares.num_kept, strict=True)):
        if index in shares.untouched:
            planned.append(keep_experts(layer.name, layer.num_experts, layer.top_k))
            continue
        known = None if statistics is None else statistics.layers[layer.name]
        if known is not None and score not in NEEDS_NO_DATA and (unseen := known.too_few(1)):
            notes.append(f"layer {layer.name!r}: no token chose the experts {unseen}; they count as 0")
        scores_E = SCORES[score](layer, known, seed=seed)
        planned.append(_best(layer, scores_E, num_kept, protected.get(layer.name, ())))
    settings = {"grouping": grouping, "protected": told(protected), "seed": seed}
    return finished_plan(
        layers, planned, shares, settings, method=score, form=form, router="slice", notes=notes
    )


def _best(layer: ExpertLayer, scores_E: torch.Tensor, num_kept: int, protected: Collection[int]) -> LayerPlan:
    kept = choose_cores(layer, scores_E, num_kept, "slice", protected=protected)
    return keep_experts(layer.name, layer.num_experts, layer.top_k, kept)
