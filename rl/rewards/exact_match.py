"""Reward 1 for the right final answer, letter by letter."""

from collections.abc import Sequence
from typing import Any

from .answers import Place, completion_text, final_answer
from .reward_set import RewardFunction


def exact_match(place: Place = "auto", *, ignore_case: bool = False) -> RewardFunction:
    """Make a reward: 1 if the final answer equals the column ``answer``, else 0.

    Spaces around both are dropped, and runs of spaces count as one.

    Args:
        place: Where in the completion the answer stands.
        ignore_case: Whether upper and lower case are the same.
    """

    def reward(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        return [
            None
            if gold is None
            else float(normal(final_answer(completion_text(c), place)) == normal(str(gold)))
            for c, gold in zip(completions, answer, strict=True)
        ]

    def normal(text: str | None) -> str | None:
        if text is None:
            return None
        text = " ".join(text.split())
        return text.casefold() if ignore_case else text

    return reward
