"""REAM: the experts that REAP would keep absorb those most like them, a few large groups and many of one."""

# T tokens, E experts, M groups

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from ..moe.layer import ExpertLayer
from ..moe.samples import InputSamples
from ..moe.statistics import LayerStatistics, RoutingStatistics
from .budget import choose_cores, share_experts
from .expert_outputs import cosines, gated_output_gram, sampled_inputs
from .group_plan import finished_plan, grouped_layer, plan_each
from .layer_plan import LayerPlan
from .merging import group_weights
from .plan import CompressionPlan, check_form
from .protection import super_experts, told
from .scores.reap import reap

SCORES_OF_RULE = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}


def plan_ream(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics,
    *,
    samples: InputSamples | None = None,
    grouping: str = "uniform",
    capacity: int = 16,
    alignment: str = "both",
    router: str = "slice",
    form: str = "moekit",
    protect: bool = True,
    seed: int = 0,
    **budget: Any,
) -> CompressionPlan:
    """Plan REAM for a model.

    Args:
        layers: ``expert_layers(model)``.
        statistics: Routing of calibration data.
        samples: What the experts read, by ``record_inputs``.
        grouping: How many groups each layer gets, one of ``SHARES``.
        capacity: C, the most experts that a centroid absorbs; the paper has 16 or 32.
        alignment: Of the members' neurons; ``both`` adds the agreement of activations and of weights.
        router: ``slice`` keeps the centroids' rows, as the paper does; or another of ``ROUTERS``.
        form: ``moekit`` or ``stock``.
        protect: Whether super experts stay alone.
        seed: Not read; the method is deterministic.
        **budget: ``experts`` or ``ratio``, ``exclude_layers`` and what else ``share_experts`` takes.

    Raises:
        ValueError: No samples, or options out of range or at odds with each other or a layer's router.

    Reference: REAM, arXiv:2604.04356. Its layers are planned one after another, each behind those that are
    merged already: `moekit compress` does so; this function takes all statistics as they are.

    *Departs from the paper*: weights are compared neuron by neuron in full, not after a PCA to 64 dimensions;
    gated outputs are those of every expert for every sampled token, with the router's score as gate.
    """
    check_form(form, router)
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1")
    shares = share_experts(layers, statistics, grouping=grouping, **budget)
    protected = super_experts(statistics) if protect else {}

    def group(index: int, layer: ExpertLayer, num_groups: int) -> LayerPlan:
        known, alone = statistics.layers[layer.name], protected.get(layer.name, ())
        saliency_E = reap(layer, known)
        centroids = choose_cores(layer, saliency_E, num_groups, router, protected=alone)
        similarity_EE = ream_similarity(layer, known, sampled_inputs(layer, samples, "ream"))
        group_of_E = absorb(similarity_EE, saliency_E, centroids, capacity=capacity, alone=alone)
        return grouped_layer(layer, group_of_E, centroids, group_weights(group_of_E, saliency_E))

    planned = plan_each(layers, shares, group)
    settings = {"grouping": grouping, "capacity": capacity, "protected": told(protected)}
    return finished_plan(
        layers, planned, shares, settings, method="ream", form=form, router=router, alignment=alignment
    )


def ream_similarity(
    layer: ExpertLayer, statistics: LayerStatistics, inputs_TD: Float[Tensor, "T D"]
) -> Float[Tensor, "E E"]:
    """Mean of the cosines of gate logits and of gated outputs, of every two experts.

    Args:
        layer: Unmerged.
        statistics: Of its routing, for the logits.
        inputs_TD: Sampled tokens, for the outputs.

    Raises:
        ValueError: The router shows no logits, or weighs by an unknown rule.
    """
    rule = layer.router_constraints.scoring
    logits_TE = layer.route(inputs_TD).router_logits if rule in SCORES_OF_RULE else None
    if logits_TE is None:
        raise ValueError(
            f"method 'ream' needs the router's scores; layer {layer.name!r} has the rule {rule!r} or shows "
            "no logits: take m-smoe with similarity='outputs', or hc-smoe"
        )
    gates_TE = SCORES_OF_RULE[rule](logits_TE.float())
    return (statistics.logit_cosine + cosines(gated_output_gram(layer, inputs_TD, gates_TE))) / 2


def absorb(
    similarity_EE: Float[Tensor, "E E"],
    saliency_E: Real[Tensor, " E"],
    centroids: Sequence[int],
    *,
    capacity: int,
    alone: Collection[int] = (),
) -> Int[Tensor, " E"]:
    """Let centroids take those most like them, the most salient first, until none is left.

    Args:
        similarity_EE: Of every two experts.
        saliency_E: Of every expert.
        centroids: M experts.
        capacity: Most experts that one absorbs.
        alone: Centroids that absorb nobody.

    Returns:
        Group of every expert; ``centroids[m]`` is in group m.

    Raises:
        ValueError: The centroids cannot hold all.
    """
    open_to_all = [m for m, centroid in enumerate(centroids) if centroid not in alone]
    left = [expert for expert in range(len(saliency_E)) if expert not in centroids]
    if len(left) > capacity * len(open_to_all):
        raise ValueError(
            f"{len(open_to_all)} centroids that absorb at most capacity={capacity} experts each cannot take "
            f"{len(left)}; raise the capacity or keep more experts"
        )
    group_of = {centroid: m for m, centroid in enumerate(centroids)}
    for m in sorted(open_to_all, key=lambda m: -float(saliency_E[centroids[m]])):
        nearest = sorted(left, key=lambda expert: -float(similarity_EE[centroids[m], expert]))[:capacity]
        group_of |= dict.fromkeys(nearest, m)
        left = [expert for expert in left if expert not in nearest]
    return torch.tensor([group_of[expert] for expert in range(len(saliency_E))])
