"""Tiny models, their routing statistics, and edits of plans, for the tests of planning and applying."""

import json
from functools import cache

from moekit.compress.plan import CompressionPlan
from moekit.moe.discovery import expert_layers
from moekit.moe.recording import record_routing
from moekit.moe.statistics import RoutingStatistics

from ..moe.samples import logits, original_case


@cache
def statistics(family: str) -> RoutingStatistics:
    """Routing of the tiny inputs. Not to be changed."""
    model, inputs, _ = original_case(family)
    with record_routing(model) as recorded:
        logits(model, inputs)
    return recorded


def layers_of(family: str):
    """Layers of the shared original. Not to be changed."""
    return expert_layers(original_case(family)[0])


def edited(plan: CompressionPlan, change) -> str:
    """The plan's JSON after ``change(data)``."""
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)
