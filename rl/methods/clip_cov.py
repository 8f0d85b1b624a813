"""Clip-Cov: some tokens of high covariance get no gradient, so that entropy lasts."""

import torch
from torch import Tensor

from ..algorithm import MethodContext, SelectionInputs, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..covariance import quota, token_covariances
from ..surrogate import clipped_surrogate, log_ratios


def selection(
    tokens: SelectionInputs,
    *,
    share: float = 2e-4,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
    epsilon: float = 1.0,
    epsilon_high: float | None = None,
) -> Tensor:
    """Draw ``max(1, floor(share N))`` tokens of those whose covariance is in the window, or all if fewer.

    Args:
        tokens: Of the whole mini-batch.
        share: Of all valid tokens.
        covariance_low: Lower bound, which depends on the scale of advantages.
        covariance_high: Upper bound.
        epsilon: Tokens that the ratio clip has silenced already are no candidates.
        epsilon_high: As in the loss.

    Reference: Cui et al., The Entropy Mechanism, section 4, arXiv:2505.22617.
    """
    covariances_N = token_covariances(tokens)
    ratios_N = (tokens.logprobs - tokens.old_logprobs).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    is_clipped_N = (tokens.advantages > 0) & (ratios_N > 1 + high)
    is_clipped_N |= (tokens.advantages < 0) & (ratios_N < 1 - epsilon)
    is_candidate_N = (covariances_N > covariance_low) & (covariances_N < covariance_high) & ~is_clipped_N
    generator = tokens.generator
    draws_N = torch.rand(len(covariances_N), generator=generator, device=generator.device)
    draws_N = torch.where(is_candidate_N, draws_N.to(covariances_N.device), -1.0)
    drawn = draws_N.topk(quota(share, len(draws_N)), sorted=False).indices
    return torch.zeros_like(is_candidate_N).index_fill(0, drawn, True) & is_candidate_N


def policy_loss(
    now: TokenStatistics,
    batch: PolicyBatch,
    context: MethodContext,
    *,
    epsilon: float = 1.0,
    epsilon_high: float | None = None,
) -> TokenLoss:
    """The clipped surrogate, 0 on selected tokens, which stay in the denominator.

    Args:
        now: Of the policy in training.
        batch: With ``selected``.
        context: Not read.
        epsilon: Clip below 1, here only a guard.
        epsilon_high: Clip above 1; ``epsilon`` by default.

    Reference: The Entropy Mechanism, section 4, arXiv:2505.22617; the clip is that of the released script.
    """
    chosen_BL, advantages_BL = batch.required("selected"), batch.required("advantages")
    found = clipped_surrogate(
        log_ratios(now, batch), advantages_BL, epsilon=epsilon, epsilon_high=epsilon_high
    )
    metrics = {**found.metrics, "selected": chosen_BL.to(found.values.dtype)}
    return TokenLoss(values=torch.where(chosen_BL, 0.0, found.values), metrics=metrics)
