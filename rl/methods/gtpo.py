"""GTPO: tokens that good and bad completions share are not pushed down, and entropy must not rise."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..algorithm import MethodContext
from ..batch import PolicyBatch
from ..conflicts import conflict_runs
from ..group_statistics import centred, group_total, is_judged


def observe(context: MethodContext) -> None:
    """Keep H_ini, the mean token entropy before the training, in the first step."""
    context.state.setdefault("initial_entropy", context.mean_entropy)


def advantage(
    batch: PolicyBatch,
    context: MethodContext,
    *,
    gamma: float = 0.1,
    w: float = 2.0,
    tau: float = math.log(2),
    overlap: Literal["max", "product"] = "max",
    normalisation: Literal["group-mean", "official"] = "group-mean",
    initial_entropy: float | None = None,
) -> Tensor:
    """``delta_i (A_i - gamma H_i) lambda_it``, ``[B, L]``, with ``A_i = R_i - mean_group R``.

    delta_i is 0 for completions of an entropy H_i above tau, if H_ini is not above it. On tokens that
    conflict (see `conflict_runs`) lambda is 0 for ``A_i < 0`` and w for ``A_i > 0``; elsewhere 1. With
    REINFORCE's loss and the mean over completions of token means it is the objective of the authors' README.

    Args:
        batch: Of whole groups, with entropies.
        context: Remembers H_ini.
        gamma: Weight of the entropy.
        w: Amplification of shared tokens of good completions.
        tau: Threshold, nats; below ln 2 one token holds the majority.
        overlap: Where the runs from both ends overlap: w (``max``), or w squared (``product``, the code).
        normalisation: ``official`` sums over the group instead of the mean, and divides by the number of
            conflicts (at least 1) that the released code counts: the longer of the two runs.
        initial_entropy: H_ini, nats; measured in the first step by default.

    *Departs from the released code*: ``tau`` is ln 2 where its settings say 0.7 or 1.02, and H_ini is
    compared with it here, not by hand.

    Reference: GTPO, Stabilizing GRPO via Gradient and Entropy Control, arXiv:2508.03772.
    """
    counts_B, entropies_B = is_judged(batch), _entropies(batch)
    centred_B = centred(batch.rewards, batch.group_ids, counts_B)
    prefix_BL, suffix_BL = conflict_runs(batch.completion_ids, batch.token_mask, centred_B, batch.group_ids)
    times_BL = prefix_BL.int() + suffix_BL.int() if overlap == "product" else (prefix_BL | suffix_BL).int()
    lambda_BL = torch.where(centred_B[:, None] < 0, 0.0, w) ** times_BL
    start = context.state["initial_entropy"] if initial_entropy is None else initial_entropy
    kept_B = counts_B & ((entropies_B <= tau) | (start > tau))
    shaped_B = torch.where(kept_B, centred_B - gamma * entropies_B, 0.0)
    if normalisation == "official":
        num_conflicts_B = torch.maximum(prefix_BL.sum(1), suffix_BL.sum(1)).clamp_min(1)
        shaped_B = shaped_B * group_total(torch.ones_like(shaped_B), batch.group_ids) / num_conflicts_B
    return shaped_B[:, None] * lambda_BL


def _entropies(batch: PolicyBatch) -> Tensor:
    """Mean of each completion, ``[B]``."""
    mask_BL = batch.policy_mask
    return torch.where(mask_BL, batch.required("old_entropies"), 0.0).sum(1) / mask_BL.sum(1).clamp_min(1)
