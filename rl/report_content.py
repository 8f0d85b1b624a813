"""What a report of a training says in words and numbers, taken from the rows of its history."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .entropy_law import EntropyLaw, fit_entropy_law

Row = Mapping[str, Any]
Points = list[tuple[int, float]]
"""Step and value."""

END_SHARE = 0.1
"""Of the steps, whose mean stands for the beginning or the end of a noisy curve."""
LAW_SCORE = "eval_pass@1"

NOTICEABLE = 0.02
"""Change of an accuracy from which it is spoken of."""
LEFT_OF_ENTROPY = 0.1
"""Of the entropy at the beginning; less is a collapse."""
LIMITS: dict[str, tuple[float, float, str]] = {
    "completions/distinct": (0.5, 1.0, "of a prompt's completions are distinct"),
    "completions/clipped_ratio": (0.0, 0.25, "of completions meet the length limit"),
    "frac_reward_zero_std": (0.0, 0.8, "of groups earn all the same and teach nothing"),
    "expert_dead_share": (0.0, 0.05, "of experts are chosen by no token"),
}
"""The range in which each share should end, and what it is."""


def points(history: Sequence[Row], name: str) -> Points:
    """The finite values of a metric."""
    return [
        (row["step"], float(row[name]))
        for row in history
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def pass_names(history: Sequence[Row], prefix: str = "eval_") -> list[str]:
    """The pass@k metrics that a history has, in the order of k."""
    names = {name for row in history for name in row if re.fullmatch(rf"{prefix}pass@\d+", name)}
    return sorted(names, key=lambda name: int(name.rpartition("@")[2]))


def ends(found: Points) -> tuple[float, float] | None:
    """Mean of the first and of the last tenth of a curve; ``None`` for fewer than two points."""
    if len(found) < 2:
        return None
    values = [value for _, value in found]
    size = max(1, int(len(values) * END_SHARE))
    return float(np.mean(values[:size])), float(np.mean(values[-size:]))


def first_and_last(found: Points) -> tuple[float, float] | None:
    """Of a curve of few points, each an evaluation of its own."""
    return (found[0][1], found[-1][1]) if len(found) > 1 else None


def law_pairs(history: Sequence[Row]) -> list[tuple[int, float, float]]:
    """Step, entropy and held-out score of each evaluation; the entropy is that of the nearest step."""
    entropies = points(history, "entropy")
    if not entropies:
        return []
    steps = np.array([step for step, _ in entropies])
    return [
        (step, entropies[int(np.abs(steps - step).argmin())][1], score)
        for step, score in points(history, LAW_SCORE)
    ]


def entropy_law(history: Sequence[Row]) -> EntropyLaw | None:
    """The fitted law, or ``None`` if the evaluations do not determine it."""
    pairs = law_pairs(history)
    try:
        return fit_entropy_law([pair[1] for pair in pairs], [pair[2] for pair in pairs])
    except ValueError:
        return None


def verdict(history: Sequence[Row]) -> list[str]:
    """Plain sentences: what was gained, and what it cost."""
    steps = max((row["step"] for row in history), default=0)
    said = [f"The policy was trained for {steps:,} steps."]
    if change := ends(points(history, "reward")):
        said.append(f"The mean reward {_moved(*change, '{:.3g}')} on training prompts.")
    names = pass_names(history)
    changes = {name: found for name in names if (found := first_and_last(points(history, name)))}
    for name in dict.fromkeys(names[:1] + names[-1:]):
        if name in changes:
            said.append(
                f"On held-out prompts {name.removeprefix('eval_')} {_moved(*changes[name], '{:.1%}')}."
            )
    if len(changes) > 1:
        said += _breadth(changes[names[0]], changes[names[-1]])
    if change := ends(points(history, "entropy")):
        said.append(f"Policy entropy {_moved(*change, '{:.3g}')} nats per token.")
    if not names:
        said.append(
            "No prompts were held out, so nothing is known of what was learnt beyond the training prompts."
        )
    return said


def _breadth(one: tuple[float, float], many: tuple[float, float]) -> list[str]:
    if one[1] - one[0] < NOTICEABLE or abs(many[1] - many[0]) < NOTICEABLE:
        return []
    if many[1] < many[0]:
        return ["It is surer of what it could do before, but solves fewer problems in many tries."]
    return ["It solves more problems in many tries, too."]


def _moved(before: float, after: float, pattern: str) -> str:
    first, last = pattern.format(before), pattern.format(after)
    if first == last:
        return f"stayed at {first}"
    return f"{'rose' if after > before else 'fell'} from {first} to {last}"


def signs_of_collapse(history: Sequence[Row]) -> list[str]:
    """What in the curves should worry their reader."""
    found = []
    if (change := ends(points(history, "entropy"))) and change[1] < LEFT_OF_ENTROPY * change[0]:
        left = 1 - change[1] / change[0]
        found.append(f"{left:.0%} of the policy's entropy is gone: it has all but stopped to explore")
    for name, (least, most, words) in LIMITS.items():
        change = ends(points(history, name))
        if change and not least <= change[1] <= most:
            found.append(f"{change[1]:.0%} {words} at the end of the training")
    return found
