"""Reward 1 for the demanded form."""

import re
from collections.abc import Sequence
from typing import Any

from .answers import completion_text
from .reward_set import RewardFunction

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ANSWER = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*"


def format_match(pattern: str | None = None) -> RewardFunction:
    """Make a reward: 1 if the whole completion has a form, else 0.

    Args:
        pattern: Regular expression for the whole of it, in which the dot matches line ends too. By default
            ``<think>...</think><answer>...</answer>``, each tag once and nothing but spaces around.

    Raises:
        ValueError: The pattern is no regular expression.
    """
    try:
        form = re.compile(_THINK_ANSWER if pattern is None else pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None

    def has_form(text: str) -> bool:
        if pattern is None and any(text.count(tag) != 1 for tag in TAGS):
            return False
        return form.fullmatch(text) is not None

    def reward(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [float(has_form(completion_text(completion))) for completion in completions]

    return reward
