"""KL-Cov: tokens of the highest covariance are held to the old policy, so that entropy lasts."""

import torch
from torch import Tensor

from ..algorithm import MethodContext, SelectionInputs, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..covariance import quota, token_covariances
from ..surrogate import log_ratios


def selection(tokens: SelectionInputs, *, share: float = 2e-3) -> Tensor:
    """The ``max(1, floor(share N))`` tokens of the highest covariance.

    Args:
        tokens: Of the whole mini-batch.
        share: Of all valid tokens; 2e-3 for 7B and 2e-4 for 32B in the paper.

    Reference: Cui et al., The Entropy Mechanism, section 4, arXiv:2505.22617.
    """
    covariances_N = token_covariances(tokens)
    chosen = covariances_N.topk(quota(share, len(covariances_N)), sorted=False).indices
    return torch.zeros_like(covariances_N, dtype=torch.bool).index_fill(0, chosen, True)


def policy_loss(
    now: TokenStatistics, batch: PolicyBatch, context: MethodContext, *, kl_weight: float = 1.0
) -> TokenLoss:
    """``-A r + kl_weight |log pi_theta - log pi_old| [selected]``; ratios are not clipped.

    In the first update of a rollout the second term and its gradient are 0: plain policy gradient.

    Args:
        now: Of the policy in training.
        batch: With ``selected``.
        context: Not read.
        kl_weight: Larger keeps more entropy.

    Reference: The Entropy Mechanism, section 4, arXiv:2505.22617; the absolute log-ratio is the released
        code's estimate of the KL divergence.
    """
    log_ratios_BL, chosen_BL = log_ratios(now, batch), batch.required("selected")
    distances_BL = torch.where(chosen_BL, log_ratios_BL.abs(), 0.0)
    values_BL = -batch.required("advantages") * log_ratios_BL.exp() + kl_weight * distances_BL
    metrics = {"selected": chosen_BL.to(values_BL.dtype), "log_ratio": log_ratios_BL.detach().abs()}
    return TokenLoss(values=values_BL, metrics=metrics)
