"""The score that reasoning-gym gives."""

import json
from collections.abc import Sequence
from typing import Any

from .answers import completion_text, final_answer
from .checker import Checker
from .reward_set import RewardFunction


def reasoning_gym_score(seconds: float = 5.0) -> RewardFunction:
    """Make a reward between 0 and 1 for rows that reasoning-gym made.

    Each row brings the columns ``metadata`` (an object, or its JSON text), whose ``source_dataset`` names
    the scorer, and ``answer``; ``question`` if the scorer reads it. The scored answer stands in
    ``<answer>``, in a box, after ``answer:``, or is all that was written. Scorers run in a process of their
    own, but with the rights of the training: some evaluate answers as Python expressions.

    Args:
        seconds: Of the processor, for one answer; one that takes longer gets 0.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    checker = Checker("reasoning-gym", "reasoning_gym", seconds)

    def score(completion: Any, answer: Any, metadata: Any, question: Any) -> float | None:
        if metadata is None:
            return None
        facts = json.loads(metadata) if isinstance(metadata, str) else metadata
        return checker.ask(
            dataset=facts["source_dataset"],
            answer=final_answer(completion_text(completion)),
            entry={"question": question, "answer": answer, "metadata": facts},
        )

    def reward(
        completions: Sequence[Any],
        answer: Sequence[Any],
        metadata: Sequence[Any],
        question: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        questions = [None] * len(completions) if question is None else question
        return [score(*row) for row in zip(completions, answer, metadata, questions, strict=True)]

    return reward
