"""M-SMoE: group experts that are routed alike, and plan to merge each group by its members' use.

Reads routing statistics, and weights only where they are asked for; changes nothing.
"""

# E experts, M groups

from collections.abc import Collection, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from ..moe.layer import ExpertLayer
from ..moe.statistics import LayerStatistics, RoutingStatistics
from .alignment import align_expert, permute_expert
from .budget import SHARES, choose_cores, share_experts
from .group_plan import finished_plan, grouped_layer, plan_each
from .grouping import assign_groups, most_used_members, random_groups
from .layer_plan import LayerPlan
from .merging import REFERENCES, WEIGHTINGS, group_weights
from .plan import AlignmentRule, CompressionPlan, check_form
from .protection import super_experts, told
from .similarity import SIMILARITIES, output_similarity, router_logit_similarity, weight_similarity

GROUPINGS = (*SHARES, "random")


def plan_m_smoe(
    layers: Sequence[ExpertLayer],
    statistics: RoutingStatistics,
    *,
    experts: int | None = None,
    ratio: float | None = None,
    grouping: str = "adaptive",
    similarity: str = "router-logits",
    weighting: str = "frequency",
    alignment: str = "weights",
    reference: str = "dominant",
    router: str = "redirect",
    form: str = "moekit",
    exclude_layers: Collection[int] = (),
    layer_experts: Sequence[int] = (),
    sensitivities: Sequence[Mapping[int, float]] = (),
    protect: bool = True,
    capacity: int | None = None,
    ties: str = "exact",
    seed: int = 0,
) -> CompressionPlan:
    """Plan M-SMoE for a model.

    Args:
        layers: ``expert_layers(model)``.
        statistics: Of calibration data, by ``record_routing``; layers that saw no token stay as they are.
        experts: Experts (groups) to keep in each merged layer, on average; give this or ``ratio``.
        ratio: Share of the experts to keep, in (0, 1].
        grouping: ``adaptive`` gives more groups to layers that use many experts; ``uniform`` gives all
            layers the same; ``sensitivity`` more to layers that are hurt more; ``random`` is uniform with
            groups drawn by ``seed``, the ablation.
        similarity: Who resembles whom: ``router-logits`` (the paper's), ``weights`` (of experts aligned to
            the most used one, which holds one aligned copy of a layer) or ``outputs``.
        weighting: What members weigh: ``frequency`` or ``equal``.
        alignment: How the neurons of a group's members are matched before they are added: by ``weights``, by
            ``activations`` on sampled tokens (which ``apply_plan`` then needs), or ``none``: not at all. For
            ``similarity="weights"`` experts are matched by weights, unless ``none``.
        reference: Whose neuron order they take: of the group's ``dominant`` expert or the layer's ``first``.
        router: ``redirect``, ``slice``, ``mean`` or ``logsumexp``; see ``ROUTERS``.
        form: ``moekit``, or ``stock`` for a checkpoint of the family's own class, which needs one number of
            experts in every layer and ``slice`` or ``mean``.
        exclude_layers: Indices of layers that stay as they are. The paper leaves out the first MoE layer of
            switch-base-32's encoder: ``[0]``.
        layer_experts: Experts to keep in each layer, one number each, instead of ``experts``.
        sensitivities: See ``share_experts``.
        protect: Whether super experts stay alone in their groups.
        capacity: Most members of a group; random groups have no limit.
        ties: See ``adaptive_group_counts``.
        seed: Of the random groups.

    Returns:
        A plan that fits the model.

    Raises:
        ValueError: Options out of range or at odds with each other or with a layer's router.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1 and algorithm 1,
    arXiv:2310.01334.

    *Departs from the paper*: gated experts are aligned too, to the dominant expert of the group instead of
    expert 0 (``reference="first"`` is the paper's); the total of groups is met exactly (``ties="strict"`` is
    the paper's); no layer is left out by default.
    """
    _check_options(grouping, similarity, weighting, reference, form, router)
    AlignmentRule(method=alignment)  # refuses an unknown one before any work
    budget = share_experts(
        layers,
        statistics,
        experts=experts,
        ratio=ratio,
        grouping="uniform" if grouping == "random" else grouping,
        exclude_layers=exclude_layers,
        layer_experts=layer_experts,
        sensitivities=sensitivities,
        ties=ties,
    )
    protected = super_experts(statistics) if protect and grouping != "random" else {}

    def group(index: int, layer: ExpertLayer, num_groups: int) -> LayerPlan:
        known, alone = statistics.layers[layer.name], protected.get(layer.name, ())
        if grouping == "random":
            group_of_E = random_groups(layer.num_experts, num_groups, seed + index)
            cores = most_used_members(group_of_E, known.counts).tolist()
        else:
            cores = choose_cores(layer, known.counts, num_groups, router, protected=alone)
            similarity_EE = layer_similarity(layer, known, similarity, align=alignment != "none")
            group_of_E = assign_groups(similarity_EE, known.counts, cores, capacity=capacity, alone=alone)
        shares_E = group_weights(group_of_E, known.counts, weighting=weighting)
        first = reference == "first"
        return grouped_layer(layer, group_of_E, cores, shares_E, first_is_reference=first)

    planned = plan_each(layers, budget, group)
    how = {"similarity": similarity, "weighting": weighting, "reference": reference}
    limits = {"protected": told(protected), "capacity": capacity, "ties": ties, "seed": seed}
    settings = {"grouping": grouping, **how, **limits}
    return finished_plan(
        layers, planned, budget, settings, method="m-smoe", form=form, router=router, alignment=alignment
    )


def layer_similarity(
    layer: ExpertLayer, statistics: LayerStatistics, similarity: str, *, align: bool = True
) -> Float[Tensor, "E E"]:
    """Similarity of every two experts of a layer.

    Args:
        layer: The layer; its weights are read for ``weights`` only.
        statistics: Its routing.
        similarity: ``router-logits``, ``weights`` or ``outputs``.
        align: For ``weights``: compare them in the neuron order of the most used expert.

    Returns:
        Ones on the diagonal; only the order of the entries matters.

    Raises:
        ValueError: The router shows no logits to compare, or numbers are NaN or infinite.
    """
    if similarity == "outputs":
        return output_similarity(statistics.output_sums, statistics.counts)
    if similarity == "weights":
        experts = layer.experts()
        if align:
            reference = experts[int(statistics.counts.argmax())]
            experts = [permute_expert(expert, *align_expert(expert, reference)) for expert in experts]
        return weight_similarity(experts).cpu()
    if not statistics.logit_gram.any():
        raise ValueError(
            f"layer {layer.name!r} shows no router logits to compare its experts by; "
            "use similarity='weights' or 'outputs'"
        )
    return router_logit_similarity(statistics.logit_gram)


def _check_options(
    grouping: str, similarity: str, weighting: str, reference: str, form: str, router: str
) -> None:
    """Refuse before any work what would be refused after it."""
    check_form(form, router)
    options = (
        ("grouping", grouping, GROUPINGS),
        ("similarity", similarity, tuple(SIMILARITIES)),
        ("weighting", weighting, WEIGHTINGS),
        ("reference", reference, REFERENCES),
    )
    for what, got, allowed in options:
        if got not in allowed:
            raise ValueError(f"{what}={got!r} is not one of {', '.join(allowed)}")
    if form == "stock" and grouping == "adaptive":
        raise ValueError(
            "form='stock' needs the same number of experts in every layer, which grouping='adaptive' does "
            "not give; use grouping='uniform', or form='moekit'"
        )
