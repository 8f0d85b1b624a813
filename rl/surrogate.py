"""What policy losses share: importance ratios of the counted tokens, and the clipped surrogate."""

# B completions, L positions

import torch
from jaxtyping import Float
from torch import Tensor

from .algorithm import TokenLoss, TokenStatistics
from .batch import PolicyBatch

MAX_LOG_RATIO = 20.0
"""Ratios beyond e^20 or below e^-20 are cut off, without gradient: infinity times 0 would be NaN."""


def log_ratios(now: TokenStatistics, batch: PolicyBatch) -> Float[Tensor, "B L"]:
    """``log pi_theta - log pi_old`` of the tokens that the policy loss counts, 0 elsewhere."""
    difference_BL = now.logprobs - batch.required("old_logprobs")
    return torch.where(batch.policy_mask, difference_BL, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def unit_ratios(now: TokenStatistics, batch: PolicyBatch) -> Float[Tensor, "B L"]:
    """``pi_theta / sg[pi_theta]``: 1, with the gradient of log pi_theta."""
    return torch.where(batch.policy_mask, now.logprobs - now.logprobs.detach(), 0.0).exp()


def clipped_surrogate(
    log_ratios_BL: Float[Tensor, "B L"],
    advantages_BL: Float[Tensor, "B L"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> TokenLoss:
    """``-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``.

    Args:
        log_ratios_BL: log r, of tokens or of whole completions.
        advantages_BL: A.
        epsilon: How far below 1 a ratio may fall before a bad token stops to learn.
        epsilon_high: How far above 1 before a good one does; ``epsilon`` by default.
        delta: Bound of the ratio of bad tokens; above ``1 + epsilon_high`` it is the dual clip.

    Reference: PPO, eq. 7, arXiv:1707.06347; clip-higher, DAPO, arXiv:2503.14476; dual clip, arXiv:1912.09729.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratios_BL = log_ratios_BL.exp()
    capped_BL = ratios_BL if delta is None else ratios_BL.clamp(max=delta)
    clipped_BL = ratios_BL.clamp(1 - epsilon, 1 + high)
    values_BL = -torch.minimum(capped_BL * advantages_BL, clipped_BL * advantages_BL)
    found_BL = ratios_BL.detach()
    is_low_BL = (found_BL < 1 - epsilon) & (advantages_BL < 0)
    is_high_BL = (found_BL > 1 + high) & (advantages_BL > 0)
    flags = {"clip_ratio/low": is_low_BL, "clip_ratio/high": is_high_BL}
    return TokenLoss(values=values_BL, metrics={name: f.to(found_BL.dtype) for name, f in flags.items()})


def k3(logprobs_BL: Float[Tensor, "B L"], ref_logprobs_BL: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Estimate of KL(policy || reference) on the policy's tokens: ``e^d - d - 1``, d = ref - now."""
    difference_BL = (ref_logprobs_BL - logprobs_BL).clamp(max=MAX_LOG_RATIO)
    return difference_BL.expm1() - difference_BL
