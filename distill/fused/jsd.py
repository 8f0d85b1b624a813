"""The generalised Jensen-Shannon divergence in chunks."""

# R rows, C columns; S student, T teacher

from torch import Tensor

from .kl import kl, reverse_kl
from .objective import Objective
from .softmax import expectation, log_mixture, softmax_objective, through_softmax_


def jsd(*, temperature: float = 1.0, beta: float = 0.5) -> Objective:
    """``tau^2 (b KL(T || M) + (1 - b) KL(S || M))`` with ``M = b T + (1 - b) S``.

    b = 0 and b = 1 mean the forward and the reverse KL, the limits of the loss over b and over 1 - b. The
    derivative by S is ``(1 - b) log(S / M)``: what comes through M adds up to a constant.

    Args:
        temperature: tau.
        beta: b, from 0 to 1.

    Raises:
        ValueError: An argument out of its range.

    Reference: Agarwal et al., GKD (ICLR 2024), arXiv:2306.13649.

    *Departs from the paper*: the factor tau^2.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is not between 0 (forward KL) and 1 (reverse KL)")
    if beta in (0, 1):
        return reverse_kl(temperature=temperature) if beta else kl(temperature=temperature)

    def divergence(log_s_RC: Tensor, log_t_RC: Tensor) -> tuple[Tensor, Tensor]:
        log_middle_RC = log_mixture(log_t_RC, log_s_RC, beta)
        from_teacher_R = expectation(log_t_RC.exp(), log_t_RC - log_middle_RC)
        from_middle_RC = log_middle_RC.neg_().add_(log_s_RC)
        s_RC = log_s_RC.exp_()
        loss_R = from_teacher_R * beta + expectation(s_RC, from_middle_RC) * (1 - beta)
        return loss_R, through_softmax_(from_middle_RC, s_RC).mul_(1 - beta)

    return softmax_objective(divergence, temperature)
