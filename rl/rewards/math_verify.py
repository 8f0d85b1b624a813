"""Reward 1 for an answer that is mathematically equal to the right one."""

from collections.abc import Sequence
from typing import Any

from .answers import completion_text, without_thoughts
from .checker import Checker
from .reward_set import RewardFunction


def math_equal(seconds: float = 5.0) -> RewardFunction:
    r"""Make a reward: 1 if math-verify finds the answer equal to ``answer`` or ``solution``, else 0.

    The last ``\boxed{...}`` comes first, then other LaTeX, then plain numbers; thoughts do not count.
    ``None`` where the right answer cannot be read. Answers are judged in a process of their own, because
    some never end.

    Args:
        seconds: Of the processor, for one answer; one that takes longer gets 0.

    Raises:
        ValueError: math-verify is not installed.
    """
    checker = Checker("math", "math_verify", seconds)

    def reward(
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        golds = answer if answer is not None else solution
        if golds is None:
            raise ValueError("the data have neither a column 'answer' nor 'solution'")
        return [
            None
            if gold is None
            else checker.ask(gold=str(gold), text=without_thoughts(completion_text(completion)))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    return reward
