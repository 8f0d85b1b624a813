"""ROVER: learn the value of the uniformly random policy, as log-ratios, without clip or critic."""

import torch

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..surrogate import log_ratios


def policy_loss(
    now: TokenStatistics, batch: PolicyBatch, context: MethodContext, *, rho: float = 1.0, beta: float = 1.0
) -> TokenLoss:
    """``(Q_t - sg[A + beta Q'_{t+1}])^2`` with A the reward minus the group's mean.

    ``Q_t = rho log(pi_theta(a_t) / pi_old(a_t))``, and ``Q'_{t+1}`` the mean over the vocabulary of the same
    at the next position, 0 after the last. In the first update of a rollout both are 0 and the gradient is
    2 rho times that of REINFORCE.

    Args:
        now: With the mean over the vocabulary of log p.
        batch: With the same of the old policy.
        context: Not read.
        rho: Temperature of the value.
        beta: Weight of the next value.

    *Departs from the released code*: rewards are not divided by their standard deviation, as the paper says.

    Reference: He et al., Random Policy Valuation for Diverse Reasoning (ICLR 2026), arXiv:2509.24981.

    Raises:
        ValueError: Nobody computed the means over the vocabulary.
    """
    old_means_BL = batch.required("old_mean_vocab_logprobs")
    if now.mean_vocab_logprobs is None:
        raise ValueError("ROVER needs the mean over the vocabulary of log p at each position")
    changes_BL = torch.where(batch.policy_mask, now.mean_vocab_logprobs.detach() - old_means_BL, 0.0)
    next_BL = rho * torch.nn.functional.pad(changes_BL[:, 1:], (0, 1))
    values_BL = rho * log_ratios(now, batch)
    targets_BL = batch.required("advantages") + beta * next_BL
    metrics = {"q": values_BL.detach(), "next_q": next_BL, "target": targets_BL}
    return TokenLoss(values=(values_BL - targets_BL).square(), metrics=metrics)
