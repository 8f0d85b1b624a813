"""RLOO: REINFORCE whose baseline is the mean reward of the other completions."""

from torch import Tensor

from ..algorithm import MethodContext
from ..batch import PolicyBatch
from ..group_statistics import is_judged, leave_one_out


def advantage(batch: PolicyBatch, context: MethodContext) -> Tensor:
    """``A_i = R_i - mean_{j != i} R_j``, ``[B]``.

    *Departs from the paper*: the KL penalty is the trainer's (a loss term), not part of the reward.

    Reference: Ahmadian et al., Back to Basics (ACL 2024), arXiv:2402.14740.
    """
    return leave_one_out(batch.rewards, batch.group_ids, is_judged(batch))
