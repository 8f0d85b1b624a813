"""Share a number of experts among layers by what it was measured to cost each of them."""

# L layers, E experts, M kept experts

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..moe.layer import ExpertLayer


def possible_counts(layer: ExpertLayer, asked: int) -> range:
    """Numbers of experts that a layer could keep instead of the asked one.

    From what its router needs to all; a group-limited router goes in steps of its groups, so that if the
    asked number divides among them, each of these does.
    """
    step = layer.router_constraints.num_groups
    fewest = min(_fewest(layer), asked)
    return range(fewest + (asked - fewest) % step, layer.num_experts + 1, step)


def counts_to_measure(layer: ExpertLayer, asked: int) -> tuple[int, ...]:
    """Up to four numbers of experts that tell how a layer's loss grows: fewest, asked, and between."""
    possible = possible_counts(layer, asked)
    low, middle, high = 0, possible.index(asked), len(possible) - 1
    positions = {low, (low + middle) // 2, middle, (middle + high + 1) // 2} - {high}
    return tuple(possible[position] for position in sorted(positions))


def losses_between(measured: Mapping[int, float], possible: range, num_experts: int) -> np.ndarray:
    """Loss at each possible number of experts, from a few that were measured.

    The square root of the loss is taken as linear between them: a KL divergence grows with the square of
    what is missing. All experts cost nothing, and fewer never cost less.

    Args:
        measured: Loss by number of kept experts; the fewest possible must be among them.
        possible: Numbers to find it for.
        num_experts: E.

    Raises:
        ValueError: No loss at the fewest, or one that is NaN, infinite or negative.
    """
    if possible[0] < num_experts and possible[0] not in measured:
        raise ValueError(f"no loss was measured at {possible[0]} experts, the fewest that may be kept")
    if not all(0 <= loss < math.inf for loss in measured.values()):
        raise ValueError(f"losses {dict(measured)} must be finite and not negative")
    known = {**measured, num_experts: 0.0}
    counts = sorted(known)
    roots = np.interp(possible, counts, [math.sqrt(known[count]) for count in counts])
    return np.maximum.accumulate(roots[::-1] ** 2)[::-1]


def least_loss(losses: Sequence[np.ndarray], possible: Sequence[range], total: int) -> tuple[int, ...]:
    """Numbers of experts of all layers that add up to the total and whose losses have the least sum.

    Exact, by dynamic programming over the layers: ``best_l(t) = min_m best_(l-1)(t - m) + loss_l(m)``.

    Args:
        losses: ``losses[l][i]`` is what it costs that layer l keeps ``possible[l][i]`` experts.
        possible: Numbers that each layer may keep.
        total: Experts to keep in all layers together.

    Raises:
        ValueError: The layers cannot add up to it.
    """
    best, choices = np.full(total + 1, math.inf), []
    best[0] = 0.0
    for costs, counts in zip(losses, possible, strict=True):
        reached, chosen = np.full(total + 1, math.inf), np.zeros(total + 1, dtype=np.int64)
        for cost, count in zip(costs, counts, strict=True):
            sums = best[: max(0, total + 1 - count)] + cost
            better = np.flatnonzero(sums < reached[count:]) + count
            reached[better], chosen[better] = sums[better - count], count
        best = reached
        choices.append(chosen)
    if not math.isfinite(best[total]):
        ranges = ", ".join(f"{counts[0]} to {counts[-1]}" for counts in possible)
        raise ValueError(f"the layers, which may keep {ranges} experts, cannot add up to {total}")
    kept, rest = [], total
    for chosen in reversed(choices):
        kept.append(int(chosen[rest]))
        rest -= kept[-1]
    return tuple(reversed(kept))


def _fewest(layer: ExpertLayer) -> int:
    """Experts that the layer's router needs, whatever becomes of it."""
    constraints = layer.router_constraints
    size = layer.num_experts // constraints.num_groups
    for each in range(1, size):
        keep = [group * size + i for group in range(constraints.num_groups) for i in range(each)]
        try:
            layer.check_removal(keep)
        except ValueError:
            continue
        return len(keep)
    return layer.num_experts
