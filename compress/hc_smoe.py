"""HC-SMoE: cluster experts by what they say on average, and merge each cluster."""

# E experts, D hidden width, M clusters

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import linkage as link
from torch import Tensor

from ..moe.layer import ExpertLayer
from ..moe.samples import InputSamples
from ..moe.statistics import RoutingStatistics
from .budget import share_experts
from .expert_outputs import mean_outputs, sampled_inputs
from .group_plan import finished_plan, grouped_layer, plan_each
from .grouping import most_used_members
from .layer_plan import LayerPlan
from .merging import WEIGHTINGS, group_weights
from .plan import CompressionPlan, check_form
from .protection import super_experts, told

LINKAGES = ("average", "single", "complete", "ward")


def plan_hc_smoe(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics,
    *,
    samples: InputSamples | None = None,
    grouping: str = "uniform",
    linkage: str = "average",
    weighting: str = "frequency",
    alignment: str = "none",
    router: str = "redirect",
    form: str = "moekit",
    protect: bool = True,
    seed: int = 0,
    **budget: Any,
) -> CompressionPlan:
    """Plan HC-SMoE for a model.

    Features are ``o_e = mean_x f_e(x)`` over sampled tokens of the layer, whoever they were routed to;
    Euclidean distances; agglomerative clustering until the asked number is left.

    Args:
        layers: ``expert_layers(model)``.
        statistics: Routing of calibration data.
        samples: What the experts read, by ``record_inputs``.
        grouping: How many clusters each layer gets, one of ``SHARES``.
        linkage: ``average`` (the paper's), ``single``, ``complete`` or ``ward``.
        weighting: What members weigh: ``frequency`` or ``equal``.
        alignment: Of the members' neurons, one of ``ALIGNMENTS``; the paper has none.
        router: One of ``ROUTERS``; ``redirect`` is the paper's.
        form: ``moekit`` or ``stock``.
        protect: Whether super experts stay alone.
        seed: Not read; clustering is deterministic.
        **budget: ``experts`` or ``ratio``, ``exclude_layers`` and what else ``share_experts`` takes.

    Raises:
        ValueError: No samples, or options out of range or at odds with each other or a layer's router.

    Reference: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering" (HC-SMoE, ICML
    2025), arXiv:2410.08589.

    *Departs from the paper*: the mean is over an even sample of the tokens (2,048 by default), not all; the
    released scripts misspell the option and run k-means.
    """
    check_form(form, router)
    for what, got, allowed in (("linkage", linkage, LINKAGES), ("weighting", weighting, WEIGHTINGS)):
        if got not in allowed:
            raise ValueError(f"{what}={got!r} is not one of {', '.join(allowed)}")
    shares = share_experts(layers, statistics, grouping=grouping, **budget)
    protected = super_experts(statistics) if protect else {}

    def group(index: int, layer: ExpertLayer, num_groups: int) -> LayerPlan:
        features_ED = mean_outputs(layer, sampled_inputs(layer, samples, "hc-smoe"))
        alone = protected.get(layer.name, ())
        group_of_E = cluster(features_ED, num_groups, linkage=linkage, alone=alone)
        counts_E = statistics.layers[layer.name].counts
        cores = most_used_members(group_of_E, counts_E).tolist()
        shares_E = group_weights(group_of_E, counts_E, weighting=weighting)
        return grouped_layer(layer, group_of_E, cores, shares_E)

    planned = plan_each(layers, shares, group)
    settings = {
        "grouping": grouping,
        "linkage": linkage,
        "weighting": weighting,
        "protected": told(protected),
    }
    return finished_plan(
        layers, planned, shares, settings, method="hc-smoe", form=form, router=router, alignment=alignment
    )


def cluster(
    features_ED: Float[Tensor, "E D"],
    num_groups: int,
    *,
    linkage: str = "average",
    alone: Collection[int] = (),
) -> Int[Tensor, " E"]:
    """Agglomerative clusters of experts, exactly as many as asked, whatever ties there are.

    Args:
        features_ED: One row for each expert.
        num_groups: Clusters M, at most E.
        linkage: One of ``LINKAGES``.
        alone: Experts that stay by themselves.

    Returns:
        Cluster of every expert, labels 0..M-1 in the order of their first members.

    Raises:
        ValueError: NaN or infinity among the features, or no cluster left for those that are not alone.
    """
    if not features_ED.isfinite().all():
        raise ValueError("mean outputs of experts hold NaN or infinity; check the model")
    free = [expert for expert in range(len(features_ED)) if expert not in alone]
    wanted = num_groups - len(alone)
    if not 1 <= wanted <= len(free):
        raise ValueError(
            f"{num_groups} groups, {len(alone)} of them closed, do not hold {len(features_ED)} experts; keep "
            "more experts"
        )
    members = [[expert] for expert in free]
    if wanted < len(free):
        # Row n joins two clusters into number len(free) + n; the first rows are the closest.
        for first, second, *_ in link(features_ED[free].numpy(), method=linkage)[: len(free) - wanted]:
            members.append(members[int(first)] + members[int(second)])
            members[int(first)] = members[int(second)] = []
    groups = sorted([sorted(group) for group in members if group] + [[expert] for expert in alone])
    labels_E = torch.empty(len(features_ED), dtype=torch.long)
    for label, group in enumerate(groups):
        labels_E[group] = label
    return labels_E
