"""From the groups of each layer to a plan that fits the model."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from ..moe.layer import ExpertLayer
from .budget import Budget
from .grouping import group_members
from .layer_plan import ExpertGroup, LayerPlan, keep_experts
from .plan import AlignmentRule, CompressionPlan, ModelIdentity


def plan_each(
    layers: Sequence[ExpertLayer], budget: Budget, group: Callable[[int, ExpertLayer, int], LayerPlan]
) -> list[LayerPlan]:
    """Plans of all layers; those that keep all their experts stay as they are.

    Args:
        layers: All MoE layers.
        budget: How many experts each keeps.
        group: From the index of a layer, the layer and its number of groups to its plan.
    """
    return [
        keep_experts(layer.name, layer.num_experts, layer.top_k)
        if index in budget.untouched or num_groups == layer.num_experts
        else group(index, layer, num_groups)
        for index, (layer, num_groups) in enumerate(zip(layers, budget.num_kept, strict=True))
    ]


def grouped_layer(
    layer: ExpertLayer,
    group_of_E: Tensor,
    cores: Sequence[int],
    shares_E: Tensor,
    *,
    first_is_reference: bool = False,
) -> LayerPlan:
    """Plan for one layer.

    Args:
        layer: The layer.
        group_of_E: Group of every expert, labels 0..M-1.
        cores: ``cores[m]`` is the member of group m whose router row stands for it.
        shares_E: Share of every expert in the merged expert of its group.
        first_is_reference: Whether members take the neuron order of expert 0 of the layer, not of their core.
    """
    members, shares = group_members(group_of_E, len(cores)), shares_E.tolist()
    groups = [
        ExpertGroup(
            experts=tuple(experts),
            weights=tuple(shares[e] for e in experts),
            core=core,
            reference=0 if first_is_reference else core,
        )
        for core, experts in sorted(zip(cores, members, strict=True))
    ]
    return LayerPlan(name=layer.name, num_experts=layer.num_experts, top_k=layer.top_k, groups=tuple(groups))


def finished_plan(
    layers: Sequence[ExpertLayer],
    planned: Sequence[LayerPlan],
    budget: Budget,
    settings: dict[str, Any],
    *,
    method: str,
    form: str,
    router: str,
    alignment: str = "none",
    notes: Collection[str] = (),
) -> CompressionPlan:
    """The plan, checked against the model.

    Args:
        layers: All MoE layers.
        planned: What becomes of each.
        budget: How many experts each was to keep.
        settings: Of the method, for the record.
        method: Its name.
        form: Of the checkpoint.
        router: What becomes of the routers.
        alignment: Of the members of a group.
        notes: What the reader should know, beside the budget's.

    Raises:
        ValueError: The plan contradicts itself or does not fit the model.
    """
    plan = CompressionPlan(
        model=ModelIdentity.of(layers),
        method=method,
        form=form,
        router=router,
        alignment=AlignmentRule(method=alignment),
        layers=tuple(planned),
        requested_experts=budget.requested,
        settings={**budget.settings, **settings},
        notes=(*budget.notes, *notes),
    )
    plan.validate_against(layers)
    return plan
