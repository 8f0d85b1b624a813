"""REINFORCE with the mean reward of the group as baseline."""

from torch import Tensor

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..group_statistics import centred, is_judged
from ..surrogate import unit_ratios


def advantage(batch: PolicyBatch, context: MethodContext) -> Tensor:
    """``A_i = R_i - mean_group R``, ``[B]``."""
    return centred(batch.rewards, batch.group_ids, is_judged(batch))


def policy_loss(now: TokenStatistics, batch: PolicyBatch, context: MethodContext) -> TokenLoss:
    """``-A pi_theta / sg[pi_theta]`` for each token: the gradient is that of ``-A log pi_theta``.

    Right for one update of each rollout, because it has no importance ratio. Summed over tokens and divided
    by a constant it is the plain policy gradient.

    Reference: Williams, Simple statistical gradient-following algorithms (Machine Learning, 1992).
    """
    return TokenLoss(values=-unit_ratios(now, batch) * batch.required("advantages"))
