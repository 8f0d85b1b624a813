"""Ranks that a descent may cut to."""

# O outputs, I inputs of a matrix

from collections.abc import Sequence

from ..moe.layer import ExpertLayer

STEPS = 16
"""In which the rank goes down from where factors begin to save bytes."""


def first_saving_rank(layers: Sequence[ExpertLayer], sparse_rows: float) -> tuple[int, int]:
    """The lowest rank at which factors are no smaller than the matrices, and the highest that these have.

    Args:
        layers: Of fused experts.
        sparse_rows: Share of the rows that is stored beside the factors.
    """
    whole, largest = [], []
    for layer in layers:
        expert = layer.experts()[0]
        inner = expert.width * (1 if expert.gate is None else 2)
        shapes = ((inner, expert.hidden_size), (expert.hidden_size, expert.width))  # O, I
        dense, per_rank = sum(o * i for o, i in shapes), sum(o + i for o, i in shapes)
        whole.append(-(-round((1 - sparse_rows) * dense) // per_rank))
        largest.append(min(expert.hidden_size, expert.width))
    return min(whole), min(largest)


def rank_sizes(whole: int, largest: int) -> list[int]:
    """Ranks below the whole, in `STEPS` steps or of one each, the highest first."""
    step = max(1, whole // STEPS)
    return [rank for rank in range(whole - step, 0, -step) if rank <= largest]
