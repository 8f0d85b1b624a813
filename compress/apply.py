"""Carry out a compression plan: the only code of `compress` that changes a model."""

# E experts, M merged experts

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..moe.checkpoint import update_expert_count
from ..moe.constants import keep_weights, set_constants
from ..moe.discovery import expert_layers
from ..moe.layer import ExpertLayer
from ..moe.router import mix_router_rows
from ..moe.samples import InputSamples
from ..moe.statistics import LayerStatistics, RoutingStatistics
from ..moe.weights import ExpertWeights
from .activation_matching import check_samples, match_activations
from .alignment import Alignment, align_expert, permute_expert
from .layer_plan import ExpertGroup, LayerPlan
from .low_rank.factorise import factorise_layer
from .merging import merge_experts
from .plan import NEEDS_SAMPLES, CompressionPlan

Aligner = Callable[[int, int], Alignment]
"""From two experts of a layer, how to bring the first into the second's order."""


def apply_plan(
    model: PreTrainedModel,
    plan: CompressionPlan,
    *,
    statistics: RoutingStatistics | None = None,
    samples: InputSamples | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Merge and remove experts of a model, in place, as a plan says.

    Everything that can be refused is refused before anything is touched. Layers are done one at a time;
    beside the model there are never more than one layer's merged experts.

    Args:
        model: The model that the plan was made for.
        plan: What to do; may have been edited.
        statistics: Routing of calibration data; needed, and read, for constant experts, which say the mean
            of what they said to all of it.
        samples: What the experts read, by ``record_inputs``; needed, and read, for the alignments
            ``activations`` and ``both``; low-rank experts are better with them.
        progress: Show a progress bar on standard error.

    Returns:
        For each layer ``experts_before``, ``experts_after``, ``aligned`` (members that were aligned), and
        their mean relative distance ``|W - W_ref| / |W_ref|`` to their reference, ``distance_before`` and
        ``distance_after`` the alignment; ``None`` where none was aligned. For low-rank experts also
        ``error_up`` and ``error_down``.

    Raises:
        ValueError: The plan, the statistics or the samples do not fit the model or are missing, or a layer's
            weights hold NaN or infinity.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), algorithm 1, arXiv:2310.01334; the
    router modes ``slice``, ``mean`` and ``logsumexp`` are moekit's own.
    """
    layers = {layer.name: layer for layer in expert_layers(model)}
    plan.validate_against(list(layers.values()))
    if plan.alignment.method in NEEDS_SAMPLES:
        check_samples(samples, layers, plan.layers)
    known = {} if statistics is None else statistics.layers
    for layer_plan in plan.layers:
        if not layer_plan.is_identity:
            check_finite(layers[layer_plan.name])
            if plan.router == "constant":
                _check_known(layers[layer_plan.name], known.get(layer_plan.name))
    report = {}
    for layer_plan in tqdm(plan.layers, desc="merging", unit="layer", disable=not progress):
        report[layer_plan.name] = apply_layer(
            layers[layer_plan.name], layer_plan, plan, known=known.get(layer_plan.name), samples=samples
        )
    if plan.form == "stock":
        # Uniform, as the plan has made sure.
        update_expert_count(model, plan.layers[0].num_experts, plan.layers[0].num_kept)
    return report


@torch.no_grad()
def apply_layer(
    layer: ExpertLayer,
    layer_plan: LayerPlan,
    plan: CompressionPlan,
    *,
    known: LayerStatistics | None,
    samples: InputSamples | None,
) -> dict[str, Any]:
    """Merge and remove experts of one layer, unchecked; see `apply_plan` and `check_finite`.

    Args:
        layer: The layer.
        layer_plan: What becomes of it.
        plan: The plan that it is of, for alignment and router.
        known: Its statistics, for constant experts.
        samples: See `apply_plan`.
    """
    distances: list[tuple[float, float]] = []
    constants_CD = None
    if plan.router == "constant" and not layer_plan.is_identity:
        assert known is not None
        constants_CD = known.mean_output[layer_plan.removed]
        keep_weights(layer, layer_plan.cores)
    elif not layer_plan.is_identity:
        experts = layer.experts()
        align = _aligner(layer, plan, samples)
        merged = [_merge_group(experts, group, align, distances) for group in layer_plan.groups]
        router = "logsumexp" if plan.router == "logsumexp" else "redirect"
        layer.replace_experts(merged, layer_plan.expert_map, router=router)
        if plan.router == "mean":
            mix_router_rows(layer, [(g.experts, _unit_sum(g.weights), g.core) for g in layer_plan.groups])
        if plan.router in ("slice", "mean"):
            layer.remove_experts(layer_plan.cores)
    errors = {}
    if (rule := plan.low_rank) is not None:
        sample = None if samples is None else samples.layers.get(layer.name)
        errors = factorise_layer(layer, rule.rank, rule.sparse_rows, sample)
    if constants_CD is not None:
        set_constants(layer, constants_CD)
    before, after = zip(*distances, strict=True) if distances else ((), ())
    return {
        "experts_before": layer_plan.num_experts,
        "experts_after": layer_plan.num_kept,
        "aligned": len(distances),
        "distance_before": sum(before) / len(before) if before else None,
        "distance_after": sum(after) / len(after) if after else None,
        **errors,
    }


def _aligner(layer: ExpertLayer, plan: CompressionPlan, samples: InputSamples | None) -> Aligner | None:
    """How the plan aligns the experts of a layer; None where it does not."""
    experts, rule = layer.experts(), plan.alignment
    if rule.method == "none":
        return None
    if rule.method == "weights":
        return lambda expert, reference: align_expert(
            experts[expert], experts[reference], include_down=rule.include_down
        )
    assert samples is not None  # by `check_samples`
    return lambda expert, reference: match_activations(
        layer,
        experts[expert],
        experts[reference],
        samples.layers[layer.name].routed_to(expert, reference),
        with_weights=rule.method == "both",
    )


def _merge_group(
    experts: list[ExpertWeights],
    group: ExpertGroup,
    align: Aligner | None,
    distances: list[tuple[float, float]],
) -> ExpertWeights:
    """One expert of a group; appends the members' distances to the reference before and after alignment."""
    used = [
        (expert, weight) for expert, weight in zip(group.experts, group.weights, strict=True) if weight > 0
    ]
    if len(used) == 1:
        return experts[used[0][0]]  # a view, and bit for bit: there is nothing to align it with
    reference = experts[group.reference]

    def ordered(index: int) -> ExpertWeights:
        expert = experts[index]
        if align is None or index == group.reference:
            return expert
        aligned = permute_expert(expert, *align(index, group.reference))
        distances.append((_distance(expert, reference), _distance(aligned, reference)))
        return aligned

    return merge_experts((ordered(index) for index, _ in used), [weight for _, weight in used])


def _distance(expert: ExpertWeights, reference: ExpertWeights) -> float:
    """Relative distance of all weights of two experts, as they stand."""
    pairs = [(tensor.float(), getattr(reference, name).float()) for name, tensor in expert.named_tensors()]
    apart = sum((mine - theirs).square().sum() for mine, theirs in pairs)
    size = sum(theirs.square().sum() for _, theirs in pairs)
    return float((torch.as_tensor(apart) / torch.as_tensor(size).clamp_min(1e-30)).sqrt())


def _check_known(layer: ExpertLayer, known: LayerStatistics | None) -> None:
    """Refuse to make constants of what was never seen."""
    if known is None:
        raise ValueError(
            f"constant experts need what the experts of layer {layer.name!r} said: run calibration text "
            "inside `with record_routing(model) as statistics` and pass statistics=statistics"
        )
    if (known.num_experts, known.hidden_size) != (layer.num_experts, layer.hidden_size):
        raise ValueError(
            f"the statistics are of another model: {known.num_experts} experts of width {known.hidden_size} "
            f"in layer {layer.name!r}, which has {layer.num_experts} of width {layer.hidden_size}"
        )


def _unit_sum(weights: tuple[float, ...]) -> list[float]:
    """The weights of an edited plan may miss 1 by a rounding."""
    return [weight / sum(weights) for weight in weights]


def check_finite(layer: ExpertLayer) -> None:
    """Refuse experts whose weights are not numbers.

    Raises:
        ValueError: NaN or infinity; names expert and layer.
    """
    for index, expert in enumerate(layer.experts()):
        for name, tensor in expert.named_tensors():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{name} of expert {index} in layer {layer.name!r} holds NaN or infinity; "
                    "nothing was changed, check the checkpoint"
                )
