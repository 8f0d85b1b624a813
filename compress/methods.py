"""The methods of compression by name. To add one: a file with its planner, and a row here.

A planner is called as ``planner(layers, statistics, experts=..., form=..., exclude_layers=...)``, or with
``ratio`` or ``layer_experts`` instead of ``experts``, with options of its own beside these. It changes
nothing and returns a plan that fits the model. Nothing else needs to know it: `apply_plan`, the command and
the report read plans.
"""

from collections.abc import Callable
from functools import partial

from .hc_smoe import plan_hc_smoe
from .m_smoe import plan_m_smoe
from .mone import plan_mone
from .plan import CompressionPlan
from .prune import plan_pruning
from .ream import plan_ream
from .scores import SCORES

Planner = Callable[..., CompressionPlan]

METHODS: dict[str, Planner] = {
    "m-smoe": plan_m_smoe,
    "hc-smoe": plan_hc_smoe,
    "ream": plan_ream,
    "mone": plan_mone,
    **{score: partial(plan_pruning, score=score) for score in SCORES},
}
NEEDS_SAMPLES = frozenset({"hc-smoe", "ream"})
"""Methods whose planners also need ``samples=``, what the experts read, by ``record_inputs``."""
SEQUENTIAL = frozenset({"ream"})
"""Methods that plan each layer behind those that are merged already, unless told otherwise."""
