"""Reward functions by name, and those of the user."""

import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .exact_match import exact_match
from .format import format_match
from .math_verify import math_equal
from .number import number_match
from .reasoning_gym import reasoning_gym_score
from .reward_set import NamedReward, RewardFunction
from .soft_overlong import soft_overlong

REWARDS: dict[str, Callable[..., RewardFunction]] = {
    "exact-match": exact_match,
    "number": number_match,
    "math": math_equal,
    "format": format_match,
    "soft-overlong": soft_overlong,
    "reasoning-gym": reasoning_gym_score,
}
"""What makes each; all settings have defaults, but for ``max_completion_length``."""

KEEPS_TIME = frozenset({"math", "reasoning-gym"})
"""These have a time-out for each answer."""


def load_reward(spec: str, *, weight: float = 1.0, max_completion_length: int | None = None) -> NamedReward:
    """Find a reward function.

    Args:
        spec: A name of `REWARDS`, ``module:function``, or ``path/to/file.py:function``. The module or file is
            executed.
        weight: Of it.
        max_completion_length: Of the training, for the functions that ask for it.

    Raises:
        ValueError: There is no such name, module, file or function, or importing it fails.
    """
    if ":" not in spec:
        return _built_in(spec, weight, max_completion_length)
    place, _, attribute = spec.rpartition(":")
    module = _module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise ValueError(
            f"reward {spec!r}: {place} has no function {attribute!r}; it has: {', '.join(found) or 'none'}"
        )
    return NamedReward(name=attribute, function=function, weight=weight)


def _built_in(name: str, weight: float, max_completion_length: int | None) -> NamedReward:
    if name not in REWARDS:
        raise ValueError(
            f"there is no reward {name!r}; there are: {', '.join(REWARDS)}; your own is named "
            "module:function or path/to/file.py:function"
        )
    settings: dict[str, Any] = {}
    if "max_completion_length" in inspect.signature(REWARDS[name]).parameters:
        if max_completion_length is None:
            raise ValueError(f"reward {name!r} needs max_completion_length")
        settings["max_completion_length"] = max_completion_length
    return NamedReward(
        name=name,
        function=REWARDS[name](**settings),
        weight=weight,
        timeout_seconds=math.inf if name in KEEPS_TIME else None,
    )


def _module(place: str) -> ModuleType:
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise ValueError(f"reward file {place!r} does not exist") from None
    except Exception as error:
        hint = "" if place.endswith(".py") else "; a file is named path/to/file.py:function"
        raise ValueError(
            f"importing {place!r} for a reward fails: {type(error).__name__}: {error}{hint}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    path = path.resolve(strict=True)
    name = f"moekit_reward_{re.sub(r'[^0-9A-Za-z]', '_', str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
