"""GRPO; with other settings and reductions also Dr. GRPO and DAPO, which are rows in `algorithms.py`."""

from torch import Tensor

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..group_statistics import Scale, is_judged, z_scores
from ..surrogate import clipped_surrogate, log_ratios


def advantage(batch: PolicyBatch, context: MethodContext, *, scale_rewards: Scale = "group") -> Tensor:
    """``A_i = (R_i - mean_group R) / (std R + 1e-4)``, ``[B]``.

    Args:
        batch: Of whole groups.
        context: Not read.
        scale_rewards: ``group`` divides by the standard deviation of the group, ``batch`` by that of all
            rewards, ``none`` by nothing (Dr. GRPO).

    Reference: Shao et al., DeepSeekMath, section 4.1.2, arXiv:2402.03300; Liu et al., Understanding
        R1-Zero-like training (Dr. GRPO), section 3.2, arXiv:2503.20783.
    """
    return z_scores(batch.rewards, batch.group_ids, is_judged(batch), scale=scale_rewards)


def policy_loss(
    now: TokenStatistics,
    batch: PolicyBatch,
    context: MethodContext,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> TokenLoss:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, r the ratio of each token.

    Args:
        now: Of the policy in training.
        batch: With advantages and old log-probs.
        context: Not read.
        epsilon: Clip below 1.
        epsilon_high: Clip above 1; ``epsilon`` by default, 0.28 in DAPO.
        delta: Largest ratio of tokens with a negative advantage.

    *Departs from the paper*: the KL divergence from a reference is the trainer's, not the method's.

    Reference: DeepSeekMath, eq. 3, arXiv:2402.03300; Yu et al., DAPO, eq. 8, arXiv:2503.14476.
    """
    return clipped_surrogate(
        log_ratios(now, batch),
        batch.required("advantages"),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
    )
