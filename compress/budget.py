"""How many experts each layer keeps, and which lead: `--experts` or `--ratio` turned into numbers per layer.

Every method of compression starts here, so they all count, refuse and explain alike. Reads statistics and
layer facts, never weights.
"""

# E experts, M kept experts

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Real
from torch import Tensor

from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from .grouping import adaptive_group_counts, dominant_experts, uniform_group_counts
from .plan import check_unmerged

SHARES = ("adaptive", "uniform")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Experts that each layer keeps."""

    num_kept: tuple[int, ...]
    """M of every layer; E for a layer that stays as it is."""
    requested: int
    """Experts asked for over all layers, those of untouched layers included."""
    untouched: frozenset[int]
    """Indices of the layers that stay as they are."""
    notes: tuple[str, ...]
    """Why they do."""


def share_experts(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics,
    *,
    experts: int | None = None,
    ratio: float | None = None,
    grouping: str = "adaptive",
    exclude_layers: Collection[int] = (),
    ties: str = "exact",
) -> Budget:
    """Decide how many experts each layer keeps.

    Layers that never ran while the statistics were recorded stay as they are, with a note; nothing is known
    of their experts.

    Args:
        layers: All MoE layers of the model.
        statistics: How they routed.
        experts: Experts to keep in each merged layer, on average for ``adaptive``. Give this or ``ratio``.
        ratio: Share of the experts of each merged layer to keep, in (0, 1]; rounded to whole experts.
        grouping: ``adaptive`` gives more to layers that use many experts, ``uniform`` the same to all.
        exclude_layers: Indices into ``layers`` of layers that stay as they are.
        ties: See ``adaptive_group_counts``.

    Returns:
        Experts per layer.

    Raises:
        ValueError: Neither or both of ``experts`` and ``ratio``, either out of range, fewer experts than a
            router must choose, statistics of another model, layers merged before, or nothing left to merge.
    """
    if grouping not in SHARES:
        raise ValueError(f"grouping={grouping!r} is not one of {', '.join(SHARES)}")
    if (experts is None) == (ratio is None):
        raise ValueError(f"give either experts or ratio, got experts={experts} and ratio={ratio}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is not a share in (0, 1], the part of the experts to keep")
    check_unmerged(layers)
    check_statistics(layers, statistics)
    outside = sorted(set(exclude_layers) - set(range(len(layers))))
    if outside:
        raise ValueError(
            f"exclude_layers names layer {outside[0]}; the MoE layers are 0 to {len(layers) - 1}"
        )
    silent = [i for i, layer in enumerate(layers) if not _num_tokens(layer, statistics)]
    untouched = frozenset({*exclude_layers, *silent})
    merged = [i for i in range(len(layers)) if i not in untouched]
    if not merged:
        raise ValueError(
            f"no layer is left to compress: of {len(layers)}, {len(set(exclude_layers))} are excluded and "
            f"{len(silent)} saw no token; exclude fewer, or record the routing on data that reaches them"
        )
    targets = [_target(layers[i], experts, ratio) for i in merged]
    usage_LE = [_counts(layer, statistics) for layer in layers]
    minimum = max(layers[i].top_k for i in merged)
    if grouping == "adaptive":
        average = sum(targets) / len(targets)
        shared = adaptive_group_counts(usage_LE, average, excluded=untouched, minimum=minimum, ties=ties)
        num_kept, requested = shared.num_groups, shared.requested
    else:
        by_layer = dict(zip(merged, targets, strict=True))
        # One call for each layer, for a ratio gives layers of other sizes other numbers.
        num_kept = tuple(
            uniform_group_counts([layer.num_experts], by_layer.get(i, layer.num_experts)).actual
            for i, layer in enumerate(layers)
        )
        requested = sum(num_kept)
    notes = [f"layer {layers[i].name!r} is excluded and stays as it is" for i in sorted(set(exclude_layers))]
    notes += [
        f"layer {layers[i].name!r} saw no token and stays as it is" for i in silent if i not in exclude_layers
    ]
    return Budget(num_kept=num_kept, requested=requested, untouched=untouched, notes=tuple(notes))


def choose_cores(layer: ExpertLayer, counts_E: Real[Tensor, " E"], num_kept: int, router: str) -> list[int]:
    """Choose the experts that keep their place: the most used.

    Where rows of a group-limited router are to be cut (DeepSeek-V3 and its kin), the router's groups must
    stay of one size, so the most used of each group are chosen.

    Args:
        layer: The layer.
        counts_E: How often each expert was selected.
        num_kept: M, between 1 and E.
        router: The plan's router mode.

    Returns:
        M expert ids, ascending.

    Raises:
        ValueError: M does not divide among the router's groups.
    """
    num_groups = layer.router_constraints.num_groups if router in ("slice", "mean") else 1
    if num_groups == 1:
        return dominant_experts(counts_E, num_kept).tolist()
    if num_kept % num_groups:
        raise ValueError(
            f"cannot keep {num_kept} of {layer.num_experts} experts in layer {layer.name!r} with "
            f"router={router!r}: its router chooses among {num_groups} groups of one size; keep a multiple "
            f"of {num_groups}, the same in every layer (grouping='uniform'), or use router='redirect'"
        )
    size = layer.num_experts // num_groups
    return [
        start + core
        for start in range(0, layer.num_experts, size)
        for core in dominant_experts(counts_E[start : start + size], num_kept // num_groups).tolist()
    ]


def check_statistics(layers: Sequence[ExpertLayer], statistics: RoutingStatistics) -> None:
    """Refuse statistics that were recorded on another model.

    Raises:
        ValueError: They know a layer that the model has not, or another number of experts, or no layer.
    """
    if not statistics.layers:
        raise ValueError("the routing statistics are empty; record them on some text first")
    sizes = {layer.name: layer.num_experts for layer in layers}
    for name, record in statistics.layers.items():
        if name not in sizes:
            raise ValueError(f"the statistics are of another model: it has no layer {name!r}")
        if record.num_experts != sizes[name]:
            raise ValueError(
                f"the statistics are of another model: {record.num_experts} experts in layer {name!r}, "
                f"which has {sizes[name]}"
            )


def _num_tokens(layer: ExpertLayer, statistics: RoutingStatistics) -> int:
    return statistics.layers[layer.name].num_tokens if layer.name in statistics.layers else 0


def _counts(layer: ExpertLayer, statistics: RoutingStatistics) -> Tensor:
    known = statistics.layers.get(layer.name)
    return torch.zeros(layer.num_experts) if known is None else known.counts


def _target(layer: ExpertLayer, experts: int | None, ratio: float | None) -> int:
    """M of one layer if all layers were alike; exactly one of `experts` and `ratio` is given."""
    where = f"{layer.num_experts} experts (layer {layer.name!r})"
    if experts is not None and not 1 <= experts <= layer.num_experts:
        raise ValueError(f"experts={experts} is not between 1 and {where}")
    kept = round((ratio or 0) * layer.num_experts) if experts is None else experts
    if kept < layer.top_k:
        asked = f"ratio={ratio} keeps {kept}" if experts is None else f"experts={experts}"
        raise ValueError(
            f"{asked} of {where}, fewer than its router selects, top_k={layer.top_k}; "
            f"use experts={layer.top_k} or ratio={layer.top_k / layer.num_experts:g} at least"
        )
    return kept
