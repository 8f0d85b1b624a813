"""How many experts each layer keeps, and which lead: `--experts` or `--ratio` turned into numbers per layer.

Every method of compression starts here, so they all count, refuse and explain alike. Reads statistics and
layer facts, never weights.
"""

# E experts, M kept experts

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Real
from torch import Tensor

from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from .allocation import counts_to_measure, least_loss, losses_between, possible_counts
from .grouping import adaptive_group_counts, uniform_group_counts
from .plan import check_unmerged

SHARES = ("adaptive", "uniform", "sensitivity")


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
    settings: dict[str, Any]
    """What was asked for, for the record."""


def share_experts(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics | None,
    *,
    experts: int | None = None,
    ratio: float | None = None,
    grouping: str = "adaptive",
    exclude_layers: Collection[int] = (),
    layer_experts: Sequence[int] = (),
    sensitivities: Sequence[Mapping[int, float]] = (),
    ties: str = "exact",
) -> Budget:
    """Decide how many experts each layer keeps.

    Layers that never ran while the statistics were recorded stay as they are, with a note; nothing is known
    of their experts.

    Args:
        layers: All MoE layers of the model.
        statistics: How they routed; None for methods that do not read it.
        experts: Experts to keep in each merged layer, on average unless ``uniform``. Give this, ``ratio`` or
            ``layer_experts``.
        ratio: Share of the experts of each merged layer to keep, in (0, 1]; rounded to whole experts.
        grouping: ``adaptive`` gives more to layers that use many experts, ``uniform`` the same to all,
            ``sensitivity`` those numbers whose losses, as measured, have the least sum.
        exclude_layers: Indices into ``layers`` of layers that stay as they are.
        layer_experts: Experts to keep in each layer, one number each.
        sensitivities: For ``sensitivity``: for each layer the loss of the model when that layer alone keeps
            so many experts, at the numbers of ``sensitivity_counts``; empty for layers that stay as they are.
        ties: See ``adaptive_group_counts``.

    Returns:
        Experts per layer.

    Raises:
        ValueError: Neither or both of ``experts`` and ``ratio``, either out of range, fewer experts than a
            router must choose, statistics of another model, layers merged before, or nothing left to merge.
    """
    if grouping not in SHARES:
        raise ValueError(f"grouping={grouping!r} is not one of {', '.join(SHARES)}")
    if layer_experts:
        return _given(layers, statistics, layer_experts, experts=experts, ratio=ratio)
    if (experts is None) == (ratio is None):
        raise ValueError(f"give either experts or ratio, got experts={experts} and ratio={ratio}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is not a share in (0, 1], the part of the experts to keep")
    check_unmerged(layers)
    check_statistics(layers, statistics)
    if statistics is None and grouping == "adaptive":
        raise ValueError("grouping='adaptive' reads how often experts are used; give routing statistics")
    silent = _silent(layers, statistics)
    untouched = frozenset({*exclude_layers, *silent})
    targets = {i: _target(layers[i], experts, ratio) for i in _merged(layers, exclude_layers, silent)}
    if statistics is not None and grouping == "adaptive":
        usage_LE = [_counts(layer, statistics) for layer in layers]
        minimum = max(layers[i].top_k for i in targets)
        average = sum(targets.values()) / len(targets)
        shared = adaptive_group_counts(usage_LE, average, excluded=untouched, minimum=minimum, ties=ties)
        num_kept, requested = shared.num_groups, shared.requested
    elif grouping == "sensitivity":
        num_kept = _by_sensitivity(layers, targets, sensitivities)
        requested = sum(num_kept)
    else:
        # One call for each layer, for a ratio gives layers of other sizes other numbers.
        num_kept = tuple(
            uniform_group_counts([layer.num_experts], targets.get(i, layer.num_experts)).actual
            for i, layer in enumerate(layers)
        )
        requested = sum(num_kept)
    notes = [f"layer {layers[i].name!r} is excluded and stays as it is" for i in sorted(set(exclude_layers))]
    notes += [
        f"layer {layers[i].name!r} saw no token and stays as it is" for i in silent if i not in exclude_layers
    ]
    settings: dict[str, Any] = {
        "experts": experts,
        "ratio": ratio,
        "exclude_layers": sorted(exclude_layers),
    }
    if grouping == "sensitivity":
        settings["sensitivities"] = [
            ", ".join(f"{m}: {loss:.4g}" for m, loss in sorted(losses.items())) for losses in sensitivities
        ]
    return Budget(
        num_kept=num_kept, requested=requested, untouched=untouched, notes=tuple(notes), settings=settings
    )


def sensitivity_counts(
    layers: Sequence[ExpertLayer],
    *,
    experts: int | None = None,
    ratio: float | None = None,
    exclude_layers: Collection[int] = (),
) -> list[tuple[int, ...]]:
    """Numbers of experts at which each layer's loss is to be measured for ``grouping="sensitivity"``.

    Args:
        layers: All MoE layers of the model.
        experts: As for `share_experts`.
        ratio: As for `share_experts`.
        exclude_layers: Layers that stay as they are, of which there is nothing to measure.
    """
    return [
        () if index in exclude_layers else counts_to_measure(layer, _target(layer, experts, ratio))
        for index, layer in enumerate(layers)
    ]


def _given(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics | None,
    layer_experts: Sequence[int],
    *,
    experts: int | None,
    ratio: float | None,
) -> Budget:
    """One number for each layer; those that keep all stay as they are."""
    if experts is not None or ratio is not None:
        raise ValueError("layer_experts says how many each layer keeps; leave experts and ratio out")
    check_unmerged(layers)
    check_statistics(layers, statistics)
    if len(layer_experts) != len(layers):
        raise ValueError(f"layer_experts has {len(layer_experts)} numbers for {len(layers)} MoE layers")
    for layer, number in zip(layers, layer_experts, strict=True):
        _target(layer, number, None)
    untouched = {i for i, layer in enumerate(layers) if layer_experts[i] == layer.num_experts}
    if silent := [i for i in _silent(layers, statistics) if i not in untouched]:
        raise ValueError(
            f"layer {layers[silent[0]].name!r} saw no token, so nothing is known of its experts; let it keep "
            f"all {layers[silent[0]].num_experts}, or record the routing on data that reaches it"
        )
    return Budget(
        num_kept=tuple(layer_experts),
        requested=sum(layer_experts),
        untouched=frozenset(untouched),
        notes=(),
        settings={"layer_experts": list(layer_experts)},
    )


def _by_sensitivity(
    layers: Sequence[ExpertLayer], targets: dict[int, int], sensitivities: Sequence[Mapping[int, float]]
) -> tuple[int, ...]:
    """Numbers of experts whose measured losses have the least sum, the total as asked."""
    if len(sensitivities) != len(layers):
        raise ValueError(
            f"grouping='sensitivity' needs the losses of each of {len(layers)} MoE layers, "
            f"got {len(sensitivities)}"
        )
    possible, losses = [], []
    for i, asked in targets.items():
        possible.append(possible_counts(layers[i], asked))
        try:
            losses.append(losses_between(sensitivities[i], possible[-1], layers[i].num_experts))
        except ValueError as error:
            raise ValueError(f"sensitivities of layer {layers[i].name!r}: {error}") from None
    kept = dict(zip(targets, least_loss(losses, possible, sum(targets.values())), strict=True))
    return tuple(kept.get(i, layer.num_experts) for i, layer in enumerate(layers))


def choose_cores(
    layer: ExpertLayer,
    scores_E: Real[Tensor, " E"],
    num_kept: int,
    router: str,
    *,
    protected: Collection[int] = (),
) -> list[int]:
    """Choose the experts that keep their place: those of the highest score, such as the most used.

    Where rows of a group-limited router are to be cut (DeepSeek-V3 and its kin), the router's groups must
    stay of one size, so the best of each group are chosen. Of equals the lower id is chosen.

    Args:
        layer: The layer.
        scores_E: Higher to keep.
        num_kept: M, between 1 and E.
        router: The plan's router mode.
        protected: Experts that are chosen whatever their score.

    Returns:
        M expert ids, ascending.

    Raises:
        ValueError: M does not divide among the router's groups, or leaves no room for protected experts, or a
            score is NaN.
    """
    if scores_E.isnan().any():
        raise ValueError(f"a score of layer {layer.name!r} is NaN; check the checkpoint and the statistics")
    num_groups = layer.router_constraints.num_groups if router in ("slice", "mean") else 1
    scores_E = scores_E.double().index_fill(0, torch.tensor(sorted(protected), dtype=torch.long), math.inf)
    if num_kept % num_groups:
        raise ValueError(
            f"cannot keep {num_kept} of {layer.num_experts} experts in layer {layer.name!r} with "
            f"router={router!r}: its router chooses among {num_groups} groups of one size; keep a multiple "
            f"of {num_groups}, the same in every layer (grouping='uniform'), or take a router that keeps "
            "its rows (redirect for experts that are merged, constant for those that are pruned)"
        )
    size = layer.num_experts // num_groups
    chosen = []
    for start in range(0, layer.num_experts, size):
        ranking = scores_E[start : start + size].argsort(descending=True, stable=True)
        chosen += sorted((start + ranking[: num_kept // num_groups]).tolist())
    if lost := sorted(set(protected) - set(chosen)):
        raise ValueError(
            f"{num_kept} experts of layer {layer.name!r} leave no room for the super experts {lost}; keep "
            "more, or drop the protection (protect=False)"
        )
    return chosen


def check_statistics(layers: Sequence[ExpertLayer], statistics: RoutingStatistics | None) -> None:
    """Refuse statistics that were recorded on another model; None says nothing of any.

    Raises:
        ValueError: They know a layer that the model has not, or another number of experts, or no layer.
    """
    if statistics is None:
        return
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


def _merged(
    layers: Sequence[ExpertLayer], exclude_layers: Collection[int], silent: Collection[int]
) -> list[int]:
    """Layers that do not stay as they are."""
    outside = sorted(set(exclude_layers) - set(range(len(layers))))
    if outside:
        raise ValueError(
            f"exclude_layers names layer {outside[0]}; the MoE layers are 0 to {len(layers) - 1}"
        )
    merged = [i for i in range(len(layers)) if i not in exclude_layers and i not in silent]
    if not merged:
        raise ValueError(
            f"no layer is left to compress: of {len(layers)}, {len(set(exclude_layers))} are excluded and "
            f"{len(silent)} saw no token; exclude fewer, or record the routing on data that reaches them"
        )
    return merged


def _silent(layers: Sequence[ExpertLayer], statistics: RoutingStatistics | None) -> list[int]:
    """Layers that saw no token, as far as anything is known."""
    if statistics is None:
        return []
    known = statistics.layers
    return [i for i, x in enumerate(layers) if x.name not in known or not known[x.name].num_tokens]


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
