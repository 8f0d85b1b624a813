"""Rewards compared within their groups; the order of completions does not matter."""

# B completions

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .batch import PolicyBatch

Scale = Literal["group", "batch", "none"]
"""By which sample standard deviation advantages are divided."""


def is_judged(batch: PolicyBatch) -> Bool[Tensor, " B"]:
    """Completions that take part in their group: their reward is known, and they are no rehearsal."""
    return ~batch.rewards.isnan() & ~batch.is_rehearsal


def group_total(values_B: Float[Tensor, " B"], group_ids_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sum over its group, for each completion."""
    index_B = group_ids_B.unique(return_inverse=True)[1]
    return torch.zeros_like(values_B).index_add(0, index_B, values_B)[index_B]


def group_mean(
    values_B: Float[Tensor, " B"], group_ids_B: Int[Tensor, " B"], counts_B: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The mean over those of its group that count, for each completion; 0 where none does."""
    total_B = group_total(torch.where(counts_B, values_B, 0.0), group_ids_B)
    return total_B / group_total(counts_B.to(values_B.dtype), group_ids_B).clamp_min(1)


def centred(
    values_B: Float[Tensor, " B"], group_ids_B: Int[Tensor, " B"], counts_B: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Difference from the group's mean; 0 for those that do not count.

    Differences within rounding are exactly 0: divided by a standard deviation that is rounding too, they
    would look like real ones, and GTPO reads their sign.
    """
    difference_B = values_B - group_mean(values_B, group_ids_B, counts_B)
    rounding = 8 * torch.finfo(values_B.dtype).eps
    is_real_B = difference_B.abs() > rounding * group_mean(values_B.abs(), group_ids_B, counts_B)
    return torch.where(counts_B & is_real_B, difference_B, 0.0)


def leave_one_out(
    values_B: Float[Tensor, " B"], group_ids_B: Int[Tensor, " B"], counts_B: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Difference from the mean of the others of the group; 0 where there are none."""
    size_B = group_total(counts_B.to(values_B.dtype), group_ids_B)
    return centred(values_B, group_ids_B, counts_B) * size_B / (size_B - 1).clamp_min(1)


def z_scores(
    values_B: Float[Tensor, " B"],
    group_ids_B: Int[Tensor, " B"],
    counts_B: Bool[Tensor, " B"],
    *,
    scale: Scale = "group",
    epsilon: float = 1e-4,
) -> Float[Tensor, " B"]:
    """``(r - mean) / (s + epsilon)`` with the mean of the group.

    Args:
        values_B: Rewards; those that do not count may be NaN.
        group_ids_B: Same number, same prompt.
        counts_B: Which take part; the others get 0.
        scale: s is the sample standard deviation (ddof 1) of the group, or of all completions; ``none``
            divides by nothing.
        epsilon: Keeps groups of equal rewards finite.
    """
    centred_B = centred(values_B, group_ids_B, counts_B)
    if scale == "none":
        return centred_B
    ids_B, spread_B = group_ids_B, centred_B
    if scale == "batch":
        ids_B = torch.zeros_like(group_ids_B)
        spread_B = centred(values_B, ids_B, counts_B)
    size_B = group_total(counts_B.to(values_B.dtype), ids_B)
    std_B = (group_total(spread_B.square(), ids_B) / (size_B - 1).clamp_min(1)).sqrt()
    return centred_B / (std_B + epsilon)
