"""Tiny models, their routing statistics, and edits of plans, for the tests of planning and applying."""

import copy
import json
from functools import cache

import torch
from moekit.compress.plan import CompressionPlan
from moekit.moe.discovery import expert_layers
from moekit.moe.recording import record_routing
from moekit.moe.statistics import RoutingStatistics
from torch import Tensor
from transformers import PreTrainedModel

from ..moe.families import FAMILIES, tiny_inputs


@cache
def _original(family: str) -> tuple[PreTrainedModel, dict[str, Tensor], Tensor]:
    model = FAMILIES[family]()
    inputs = tiny_inputs(model)
    return model, inputs, logits(model, inputs)


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def fresh(family: str) -> tuple[PreTrainedModel, dict[str, Tensor], Tensor]:
    """A copy to change, its inputs, and the logits of the original."""
    model, inputs, expected = _original(family)
    return copy.deepcopy(model), inputs, expected


@cache
def statistics(family: str) -> RoutingStatistics:
    """Routing of the tiny inputs. Not to be changed."""
    model, inputs, _ = _original(family)
    with record_routing(model) as recorded:
        logits(model, inputs)
    return recorded


def layers_of(family: str):
    """Layers of the shared original. Not to be changed."""
    return expert_layers(_original(family)[0])


def edited(plan: CompressionPlan, change) -> str:
    """The plan's JSON after ``change(data)``."""
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)
