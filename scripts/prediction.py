"""Foretell what a plan leaves of a model: its parameters and bytes, part by part, without touching it."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compress.layer_plan import LayerPlan
from ..compress.low_rank import low_rank_rows
from ..compress.plan import CompressionPlan, LowRankRule
from ..moe.constants import constant_map, set_constants
from ..moe.discovery import expert_layers
from ..moe.footprint import Footprint, footprint
from ..moe.layer import ExpertLayer
from ..moe.low_rank import make_low_rank


def predict_footprint(model: PreTrainedModel, plan: CompressionPlan) -> Footprint:
    """Parameters and bytes that the checkpoint will have once `plan` is applied."""
    shadow = shapes_only(model)
    layers = {layer.name: layer for layer in expert_layers(shadow)}
    for planned in plan.layers:
        shape_layer(layers[planned.name], planned, plan)
    return footprint(shadow, layers.values())


def predict_uniform(model: PreTrainedModel, share: float) -> tuple[Footprint, list[int]]:
    """Parameters and bytes with the same share of the experts in every layer, and how many experts are left.

    Routers keep all their rows, as with ``--router redirect``.
    """
    shadow = shapes_only(model)
    layers = expert_layers(shadow)
    kept = [max(layer.top_k, round(share * layer.num_physical_experts)) for layer in layers]
    for layer, num_experts in zip(layers, kept, strict=True):
        if num_experts < layer.num_physical_experts:
            num_rows = layer.num_experts
            layer.storage.allocate(num_experts)
            if layer.router_mode == "full":
                layer.set_expert_map([min(e, num_experts - 1) for e in range(num_rows)])
    return footprint(shadow, layers), kept


def shapes_only(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the meta device: all modules, shapes and types, no memory for weights.

    Whole numbers are copied; among them are the maps of merged layers, which have to be read.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
    for tensor in model.buffers():
        memo[id(tensor)] = tensor.to("meta") if tensor.is_floating_point() else tensor.clone()
    return copy.deepcopy(model, memo)


def shape_layer(layer: ExpertLayer, layer_plan: LayerPlan, plan: CompressionPlan) -> None:
    """Give a layer without weights the shapes that carrying out its plan would give it."""
    width = layer.hidden_size
    shrink(layer, layer_plan, plan.router)
    if plan.low_rank is not None:
        factorise_shapes(layer, plan.low_rank)
    if plan.router == "constant" and layer_plan.removed:
        set_constants(layer, torch.empty(len(layer_plan.removed), width, device=layer.device))


def factorise_shapes(layer: ExpertLayer, rule: LowRankRule) -> None:
    """Give a layer the shapes that its experts have as factors."""
    up, down = low_rank_rows(layer, rule.sparse_rows)
    make_low_rank(layer.experts_module, rule.rank, (up, down), layer=layer.name)


def shrink(layer: ExpertLayer, planned: LayerPlan, router: str) -> None:
    """Give a layer the shapes that carrying out its plan would give it."""
    if planned.is_identity:
        return
    if router in ("slice", "mean"):
        layer.remove_experts(planned.cores, check=False)
        return
    layer.storage.allocate(planned.num_kept)
    if router == "constant":
        layer.set_expert_map(constant_map(planned.num_experts, planned.cores))
    elif router == "logsumexp":
        layer.set_expert_groups(planned.expert_map, renormalises=False, scale=1.0)
    else:
        layer.set_expert_map(planned.expert_map)
