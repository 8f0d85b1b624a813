"""The Kullback-Leibler divergence in chunks: forward, reverse, and DistiLLM's skewed forms."""

# R rows, C columns; S student, T teacher

from torch import Tensor

from .objective import Objective
from .softmax import expectation, log_mixture, softmax_objective, through_softmax_


def kl(*, temperature: float = 1.0) -> Objective:
    """Forward: ``tau^2 KL(T || S)``, with the derivative ``tau (S - T)``.

    Raises:
        ValueError: tau is not a finite number above 0.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """
    return softmax_objective(_forward, temperature)


def reverse_kl(*, temperature: float = 1.0) -> Objective:
    """Reverse: ``tau^2 KL(S || T)``, with the derivative ``tau S (log S - log T - KL)``.

    Raises:
        ValueError: tau is not a finite number above 0.

    Reference: MiniLLM, arXiv:2306.08543.
    """
    return softmax_objective(_reverse, temperature)


def skewed_kl(*, temperature: float = 1.0, skew: float = 0.1) -> Objective:
    """``tau^2 KL(T || M)`` with ``M = a T + (1 - a) S``.

    The derivative by S is ``-(1 - a) T / M``.

    Args:
        temperature: tau.
        skew: a, from 0, which is the forward KL, to below 1.

    Raises:
        ValueError: An argument out of its range.

    Reference: Ko et al., DistiLLM (ICML 2024), arXiv:2402.03898, section 3.1; its paper has no temperature.
    """
    _check_skew(skew)

    def divergence(log_s_RC: Tensor, log_t_RC: Tensor) -> tuple[Tensor, Tensor]:
        from_middle_RC = log_t_RC - log_mixture(log_t_RC, log_s_RC, skew)
        loss_R = expectation(log_t_RC.exp(), from_middle_RC)
        return loss_R, through_softmax_(from_middle_RC.exp_().mul_(skew - 1), log_s_RC.exp_())

    return softmax_objective(divergence if skew else _forward, temperature)


def skewed_reverse_kl(*, temperature: float = 1.0, skew: float = 0.1) -> Objective:
    """``tau^2 KL(S || M)`` with ``M = a S + (1 - a) T``.

    The derivative by S is ``log(S / M) - a S / M``, up to a constant.

    Args:
        temperature: tau.
        skew: a, from 0, which is the reverse KL, to below 1.

    Raises:
        ValueError: An argument out of its range.

    Reference: Ko et al., DistiLLM (ICML 2024), arXiv:2402.03898, section 3.1; its paper has no temperature.
    """
    _check_skew(skew)

    def divergence(log_s_RC: Tensor, log_t_RC: Tensor) -> tuple[Tensor, Tensor]:
        from_middle_RC = log_s_RC - log_mixture(log_s_RC, log_t_RC, skew)
        s_RC = log_s_RC.exp_()
        loss_R = expectation(s_RC, from_middle_RC)
        return loss_R, through_softmax_(from_middle_RC.sub_(from_middle_RC.exp(), alpha=skew), s_RC)

    return softmax_objective(divergence if skew else _reverse, temperature)


def _forward(log_s_RC: Tensor, log_t_RC: Tensor) -> tuple[Tensor, Tensor]:
    t_RC = log_t_RC.exp()
    loss_R = expectation(t_RC, log_t_RC.sub_(log_s_RC))
    return loss_R, log_s_RC.exp_().sub_(t_RC)


def _reverse(log_s_RC: Tensor, log_t_RC: Tensor) -> tuple[Tensor, Tensor]:
    ratio_RC, s_RC = log_t_RC.neg_().add_(log_s_RC), log_s_RC.exp()
    loss_R = expectation(s_RC, ratio_RC)
    return loss_R, ratio_RC.sub_(loss_R[:, None]).mul_(s_RC)


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"skew={skew} is not at least 0 and below 1; the paper uses 0.1")
