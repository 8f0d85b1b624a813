"""GSPO: one importance ratio for a whole completion."""

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..surrogate import clipped_surrogate, log_ratios


def policy_loss(
    now: TokenStatistics,
    batch: PolicyBatch,
    context: MethodContext,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> TokenLoss:
    """The clipped surrogate of ``s = (pi_theta(y) / pi_old(y))^(1 / |y|)``, repeated for each token of y.

    Reduced by ``sequence-mean`` it is the paper's objective; other reductions weight a completion by its
    length. A completion is clipped as a whole, which tolerates the jumps of single tokens' probabilities that
    other experts cause in a Mixture of Experts.

    Args:
        now: Of the policy in training.
        batch: With advantages, equal for all tokens of a completion, and old log-probs.
        context: Not read.
        epsilon: Clip of s below 1.
        epsilon_high: Clip of s above 1.

    Reference: Zheng et al., Group Sequence Policy Optimization, eqs. 5-7, arXiv:2507.18071.
    """
    log_ratios_BL = log_ratios(now, batch)
    means_B1 = log_ratios_BL.sum(1, keepdim=True) / batch.policy_mask.sum(1, keepdim=True).clamp_min(1)
    return clipped_surrogate(
        means_B1.expand_as(log_ratios_BL),
        batch.required("advantages"),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
    )
