"""How much each expert of a layer is worth keeping.

A score is called as ``score(layer, statistics, seed=...)`` and returns ``[E]`` float64 on the CPU, higher to
keep. To add one: a file, and a row here.
"""

from collections.abc import Callable

from torch import Tensor

from .aimer import aimer
from .ean import ean
from .frequency import frequency
from .man import man
from .random_score import random_score
from .reap import reap
from .routing_weight import routing_weight

__all__ = ["NEEDS_NO_DATA", "SCORES", "Score"]

Score = Callable[..., Tensor]

SCORES: dict[str, Score] = {
    "frequency": frequency,
    "routing-weight": routing_weight,
    "ean": ean,
    "man": man,
    "reap": reap,
    "aimer": aimer,
    "random": random_score,
}
NEEDS_NO_DATA = frozenset({"aimer", "random"})
"""Scores that do not read the statistics."""
