"""The methods of compression by name. To add one: a file with its planner, and a row here.

A planner is called as ``planner(layers, statistics, experts=..., form=..., exclude_layers=...)``, or with
``ratio`` instead of ``experts``, with options of its own beside these. It changes nothing and returns a plan
that fits the model. Nothing else needs to know it: `apply_plan`, the command and the report read plans.
"""

from collections.abc import Callable

from .frequency_prune import plan_frequency
from .m_smoe import plan_m_smoe
from .plan import CompressionPlan

Planner = Callable[..., CompressionPlan]

METHODS: dict[str, Planner] = {
    "m-smoe": plan_m_smoe,
    "frequency": plan_frequency,
}
