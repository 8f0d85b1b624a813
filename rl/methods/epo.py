"""EPO: an entropy bonus that shrinks where the entropy leaves the range of the steps before."""

import math
from typing import Literal

import torch

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch


def observe(context: MethodContext) -> None:
    """Keep the mean token entropy of each step; the newest waits, because a step is not its own past."""
    history = context.state.setdefault("entropy_history", [])
    if (last := context.state.get("pending_entropy")) is not None:
        history.append(last)
    context.state["pending_entropy"] = context.mean_entropy


def smoothing(step: int, total_steps: int, decay: float) -> float:
    """``beta_k = 1 + exp(-decay k / floor(K / 2))``, from 2 towards 1."""
    return 1 + math.exp(-decay * step / max(1, total_steps // 2))


def regularizer(
    now: TokenStatistics,
    batch: PolicyBatch,
    context: MethodContext,
    *,
    entropy_weight: float = 1e-3,
    smooth_weight: float = 0.1,
    kappa_low: float = 0.0,
    kappa_high: float = 2.0,
    decay: float = 3.0,
    penalty: Literal["hinge", "indicator"] = "hinge",
) -> TokenLoss:
    """``-lambda (H - beta_k alpha P)``, ``P = [kappa_low M - H]_+ + [H - kappa_high M]_+``.

    M is the mean of the mean entropies of all steps before this one; P is 0 in the first.

    Args:
        now: With entropies that carry gradient.
        batch: Whose tokens count.
        context: Remembers the entropies, and knows k and K.
        entropy_weight: lambda.
        smooth_weight: alpha. Below 1 / beta_k the penalty only makes the bonus smaller: see the metric
            ``effective_entropy_weight``, minus the derivative of the loss by H.
        kappa_low: Lower end of the range; at 0 it does nothing.
        kappa_high: Upper end.
        decay: gamma in beta_k.
        penalty: ``indicator`` is P = 1 outside the range, as in the released code; it has no gradient.

    *Departs from the paper*: every turn weighs the same, not every episode.

    Reference: Xu et al., EPO (version 2), arXiv:2509.22576.
    """
    entropies_BL = torch.where(batch.policy_mask, now.entropies, 0.0)
    history = context.state.get("entropy_history", [])
    low, high = -math.inf, math.inf
    if history:
        mean = sum(history) / len(history)
        low, high = kappa_low * mean, kappa_high * mean
    below_BL, above_BL = entropies_BL < low, entropies_BL > high
    slope_BL = above_BL.to(entropies_BL.dtype) - below_BL.to(entropies_BL.dtype)
    if penalty == "indicator":
        penalty_BL, slope_BL = slope_BL.abs(), torch.zeros_like(slope_BL)
    else:
        penalty_BL = (low - entropies_BL).relu() + (entropies_BL - high).relu()
    weight = smoothing(context.step, context.total_steps, decay) * smooth_weight
    metrics = {
        "effective_entropy_weight": entropy_weight * (1 - weight * slope_BL),
        "entropy_in_range": (~below_BL & ~above_BL).to(entropies_BL.dtype),
    }
    return TokenLoss(values=-entropy_weight * (entropies_BL - weight * penalty_BL), metrics=metrics)
