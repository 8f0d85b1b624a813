"""Reward 1 for the right number."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .answers import completion_text, final_answer
from .reward_set import RewardFunction

# Commas stand between groups of three; a minus after a number, word or bracket is an operator.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-−])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def last_number(text: str) -> Decimal | None:
    """The last number of a text: of ``x = -1,234.50`` it is -1234.5, of ``5-3`` it is 3."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def number_match() -> RewardFunction:
    """Make a reward: 1 if the last number of the final answer equals that of the column ``answer``, else 0.

    Numbers are compared exactly: 3, 3.0 and 3e0 are the same, 1/2 and 0.5 are not (see ``math`` for that).
    A worked solution in the column does as well (GSM8K's ends with its number). ``None`` where the column
    has no number.
    """

    def reward(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        golds = [None if gold is None else last_number(str(gold)) for gold in answer]
        found = [last_number(final_answer(completion_text(c)) or "") for c in completions]
        return [None if gold is None else float(own == gold) for own, gold in zip(found, golds, strict=True)]

    return reward
