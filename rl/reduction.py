"""From token losses to one number, however a mini-batch is cut into micro-batches and processes."""

# B completions, L positions

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .algorithm import Reduction


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of a whole optimizer mini-batch, summed over micro-batches and processes; as floats on a device.

    Attributes:
        tokens: That the loss counts.
        sequences: Completions, those without a counted token included.
        max_length: L_max, the longest that a completion may be.
    """

    tokens: Float[Tensor, ""]
    sequences: Float[Tensor, ""]
    max_length: int


def count(mask_BL: Bool[Tensor, "B L"], is_counted_B: Bool[Tensor, " B"], max_length: int) -> Counts:
    """Of one part of a mini-batch; add up the tensors over the parts.

    Args:
        mask_BL: Counted tokens.
        is_counted_B: Completions that belong to this loss.
        max_length: L_max.
    """
    return Counts(tokens=mask_BL.sum().float(), sequences=is_counted_B.sum().float(), max_length=max_length)


def reduce_loss(
    values_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], reduction: Reduction, counts: Counts
) -> Float[Tensor, ""]:
    """This part's share of the mini-batch's loss; shares add up to the whole.

    ``token-mean``: sum / tokens (DAPO). ``sequence-mean``: mean over completions of their token means (GRPO).
    ``fixed-length``: sum / (completions x L_max) (Dr.GRPO). ``token-sum``: sum / L_max (RL-PLUS).

    Args:
        values_BL: Token losses.
        mask_BL: Counted tokens; what is outside may be anything, NaN excepted.
        reduction: How.
        counts: Of the whole mini-batch.
    """
    masked_BL = torch.where(mask_BL, values_BL, 0.0)
    if reduction == "token-mean":
        return masked_BL.sum() / counts.tokens.clamp_min(1)
    if reduction == "sequence-mean":
        means_B = masked_BL.sum(1) / mask_BL.sum(1).clamp_min(1)
        return means_B.sum() / counts.sequences.clamp_min(1)
    if reduction == "fixed-length":
        return masked_BL.sum() / (counts.sequences.clamp_min(1) * counts.max_length)
    if reduction == "token-sum":
        return masked_BL.sum() / counts.max_length
    raise ValueError(f"reduction={reduction!r} is not token-mean, sequence-mean, fixed-length or token-sum")
