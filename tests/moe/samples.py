"""Tiny models in the states that the tests of moe/ need: as built, merged, and merged with copied experts."""

import copy
from functools import cache

import torch
from moekit.moe import ExpertLayer, expert_layers
from torch import Tensor
from transformers import PreTrainedModel

from .families import FAMILIES, tiny_inputs


@cache
def _built(family: str) -> PreTrainedModel:
    return FAMILIES[family]()


def fresh(family: str) -> PreTrainedModel:
    """A copy of the family's tiny model, to change."""
    return copy.deepcopy(_built(family))


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@cache
def original_case(family: str) -> tuple[PreTrainedModel, dict[str, Tensor], Tensor]:
    """A family's tiny model, its inputs and its logits. Not to be changed."""
    model = FAMILIES[family]()
    inputs = tiny_inputs(model)
    return model, inputs, logits(model, inputs)


def fresh_case(family: str) -> tuple[PreTrainedModel, dict[str, Tensor], Tensor]:
    """A copy to change, its inputs, and the logits of the original."""
    model, inputs, expected = original_case(family)
    return copy.deepcopy(model), inputs, expected


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to rounding, relative to the largest value."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def modulo_map(layer: ExpertLayer, num_kept: int) -> list[int]:
    return [e % num_kept for e in range(layer.num_experts)]


def merged(family: str, num_kept: int = 4, router: str = "redirect") -> PreTrainedModel:
    """Each layer's first experts, behind the router of all."""
    model = fresh(family)
    for layer in expert_layers(model):
        layer.replace_experts(layer.experts()[:num_kept], modulo_map(layer, num_kept), router=router)
    return model


def replicated(family: str, num_kept: int = 4) -> PreTrainedModel:
    """The same function as `merged`, with a copy of its expert for every row of the router."""
    model = fresh(family)
    for layer in expert_layers(model):
        experts = layer.experts()
        layer.replace_experts([experts[e] for e in modulo_map(layer, num_kept)], range(layer.num_experts))
    return model


def implement(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    model.set_experts_implementation(implementation)
    return model
