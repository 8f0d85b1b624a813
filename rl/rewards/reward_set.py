"""Reward functions in TRL's form, and what they say of completions."""

# B completions

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .calling import CallError, TimedCalls, is_async

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""Called with keyword arguments only: ``prompts``, ``completions`` and ``completion_ids``, lists with an
entry for each completion; every other column of the data in the same way; ``trainer_state`` with
``global_step``; ``log_metric(name, value)``; ``log_extra(column, values)``. Gives one number for each
completion, or ``None`` where it does not apply. May be async."""

_NOT_PASSED = ("prompt", "completion", "completion_ids")
_TAKEN = ("prompts", "completions", "trainer_state", "log_metric", "log_extra")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward function.

    Attributes:
        name: In metrics.
        function: See `RewardFunction`.
        weight: In the sum; 0 only watches.
        timeout_seconds: Of one call; the set's by default, ``inf`` for a function that keeps its own time.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a reward function needs a name")
        if not math.isfinite(self.weight):
            raise ValueError(f"reward {self.name!r}: weight {self.weight} is not finite")
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(
                f"reward {self.name!r}: the function must accept **kwargs, because it is given every column "
                "of the data; add **kwargs to its parameters"
            )

    @property
    def required(self) -> set[str]:
        """Parameters without default, which the data must give."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a reward function may know of the training.

    Attributes:
        global_step: Steps done.
    """

    global_step: int


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What completions earned.

    Attributes:
        rewards: Weighted sum; NaN where no function applied or one failed.
        by_function: Of each, unweighted; NaN where it did not apply or failed.
        failures: Completions that a function failed on, by ``name/kind``; a kind is ``raised``, ``hung``,
            ``not finite`` or ``wrong type``.
        metrics: Means of what functions told to ``log_metric``.
    """

    rewards: Float[Tensor, " B"]
    by_function: dict[str, Float[Tensor, " B"]]
    failures: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Judgement:
    values: list[float]
    errors: dict[int, tuple[str, str]]
    """By completion: kind and message."""


class RewardSet:
    """Calls reward functions and adds up what they say.

    A failure costs the completions that caused it, not the run: if a call raises or hangs, every completion
    is judged alone, and only those that fail again have no reward. A missing ``None`` is left out of the
    sum, as in TRL; a failure makes the whole sum unknown, because a sum without it would be compared with
    sums that have it.

    Args:
        functions: At least one.
        timeout_seconds: Of each call, however many completions it judges.
        max_hung: So many calls may hang at once before that is an error.

    Raises:
        ValueError: No function, a name twice, or a time-out that is not positive.
    """

    def __init__(
        self, functions: Sequence[NamedReward], *, timeout_seconds: float = 10.0, max_hung: int = 8
    ) -> None:
        names = [reward.name for reward in functions]
        if not names:
            raise ValueError("no reward function is given")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"reward functions share the names {twice}; give each its own")
        self.functions = tuple(functions)
        self._calls: dict[str, TimedCalls] = {}
        for reward in functions:
            seconds = timeout_seconds if reward.timeout_seconds is None else reward.timeout_seconds
            if not seconds > 0:
                raise ValueError(f"reward {reward.name!r}: time-out of {seconds} s; it must be positive")
            self._calls[reward.name] = TimedCalls(seconds, max_hung)
        self._told: set[str] = set()

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuse data that lack what a function asks for.

        Args:
            columns: Names, ``prompt`` excepted.

        Raises:
            ValueError: A function requires a column that is not there, or a column bears a reserved name.
        """
        if clashes := [name for name in columns if name in _TAKEN]:
            raise ValueError(
                f"columns {clashes} have names that reward functions get from moekit; rename them"
            )
        passed = {name for name in columns if name not in _NOT_PASSED} | {*_TAKEN, "completion_ids"}
        for reward in self.functions:
            if missing := sorted(reward.required - passed):
                raise ValueError(
                    f"reward {reward.name!r} asks for the columns {missing}, which the data lack; "
                    f"they have: {', '.join(sorted(passed - {*_TAKEN, 'completion_ids'})) or 'none'}"
                )

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        step: int,
    ) -> Scored:
        """Judge completions.

        Args:
            prompts: B strings, or lists of messages.
            completions: B strings, or ``[{"role": "assistant", "content": ...}]`` for prompts of messages.
            completion_ids: B lists of tokens, without padding.
            columns: B values each.
            step: Steps done.

        Raises:
            ValueError: Lists of different lengths, a missing column, a function that returns another number
            of
                values than completions, or too many calls that hang.
        """
        self.check_columns(list(columns))
        lists = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        lists |= {name: values for name, values in columns.items() if name not in _NOT_PASSED}
        if len({len(values) for values in lists.values()}) > 1:
            raise ValueError(f"lists of different lengths: { {n: len(v) for n, v in lists.items()} }")
        told: dict[str, list[float]] = {}
        shared = {
            "trainer_state": TrainerState(global_step=step),
            "log_metric": lambda name, value: told.setdefault(name, []).append(float(value)),
            "log_extra": lambda column, values: None,
        }
        judged = self._judge_all(lists, shared)
        failures: dict[str, int] = {}
        for name, judgement in judged.items():
            for kind, message in judgement.errors.values():
                failures[f"{name}/{kind}"] = failures.get(f"{name}/{kind}", 0) + 1
                self._tell(name, kind, message)
        by_function = {name: torch.tensor(j.values, dtype=torch.float32) for name, j in judged.items()}
        has_failed = torch.zeros(len(prompts), dtype=torch.bool)
        for judgement in judged.values():
            has_failed[list(judgement.errors)] = True
        rewards = self._sum(by_function).masked_fill(has_failed, math.nan)
        metrics = {name: sum(values) / len(values) for name, values in told.items()}
        return Scored(rewards=rewards, by_function=by_function, failures=failures, metrics=metrics)

    def _sum(self, by_function: Mapping[str, Tensor]) -> Tensor:
        table = torch.stack([by_function[reward.name] for reward in self.functions])
        weights = torch.tensor([reward.weight for reward in self.functions], dtype=torch.float32)
        total = (table * weights[:, None]).nansum(0)
        return total.masked_fill(table.isnan().all(0), math.nan)

    def _judge_all(
        self, lists: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]
    ) -> dict[str, _Judgement]:
        """Async functions work while the others are called one after the other."""
        started = {
            reward.name: self._calls[reward.name].start(reward.function, _arguments(lists, shared))
            for reward in self.functions
            if is_async(reward.function)
        }
        judged = {}
        for reward in sorted(self.functions, key=lambda reward: reward.name in started):
            wait = started.get(reward.name) or self._calls[reward.name].start(
                reward.function, _arguments(lists, shared)
            )
            judged[reward.name] = self._judge(reward, wait, lists, shared)
        return {reward.name: judged[reward.name] for reward in self.functions}

    def _judge(
        self,
        reward: NamedReward,
        wait: Callable[[], Any],
        lists: Mapping[str, Sequence[Any]],
        shared: Mapping[str, Any],
    ) -> _Judgement:
        size = len(lists["prompts"])
        try:
            return _checked(reward.name, wait(), size)
        except CallError as error:
            if size == 1:
                return _Judgement([math.nan], {0: (error.kind, str(error))})
        parts = [_one(lists, number) for number in range(size)]
        calls = (self._calls[reward.name].start(reward.function, _arguments(part, shared)) for part in parts)
        if is_async(reward.function):
            calls = iter(list(calls))
        whole = _Judgement([], {})
        for number, (part, call) in enumerate(zip(parts, calls, strict=True)):
            single = self._judge(reward, call, part, shared)
            whole.values.extend(single.values)
            if single.errors:
                whole.errors[number] = single.errors[0]
        return whole

    def _tell(self, name: str, kind: str, message: str) -> None:
        if f"{name}/{kind}" in self._told:
            return
        self._told.add(f"{name}/{kind}")
        logger.warning(
            "reward %r failed (%s): %s; completions that it fails on are left out, and counted from now on",
            name,
            kind,
            message,
        )


def _arguments(lists: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Of one call, which may change its lists."""
    return {name: list(values) for name, values in lists.items()} | dict(shared)


def _one(lists: Mapping[str, Sequence[Any]], number: int) -> dict[str, list[Any]]:
    return {name: [values[number]] for name, values in lists.items()}


def _checked(name: str, returned: Any, size: int) -> _Judgement:
    """Numbers of what a function returned.

    Raises:
        ValueError: It is no list, or one of another length.
    """
    if not isinstance(returned, Sequence | Tensor | np.ndarray) or isinstance(returned, str | bytes):
        raise ValueError(f"reward {name!r} returned {type(returned).__name__}, not a list of numbers")
    values = list(returned)
    if len(values) != size:
        raise ValueError(
            f"reward {name!r} returned {len(values)} values for {size} completions; "
            "it must return one for each"
        )
    judged = _Judgement([], {})
    for number, value in enumerate(values):
        error = None if value is None else _fault(value)
        if error is not None:
            judged.errors[number] = error
        judged.values.append(math.nan if value is None or error is not None else float(value))
    return judged


def _fault(value: Any) -> tuple[str, str] | None:
    is_scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not isinstance(value, Real) and not is_scalar:
        return "wrong type", f"it gave {type(value).__name__}, not a number or None"
    try:
        is_finite = abs(float(value)) <= _LARGEST
    except OverflowError:  # an integer of hundreds of digits
        is_finite = False
    if not is_finite:
        return "not finite", "it gave NaN or a number beyond float32"
    return None
