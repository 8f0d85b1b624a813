"""DistiLLM's skewed divergences: the second distribution has a little of the first, so no ratio explodes."""

# N rows, V vocabulary

from jaxtyping import Float
from torch import Tensor

from .probabilities import kl_divergence, log_mixture, log_probabilities


def skewed_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Float[Tensor, " N"]:
    """``tau^2 KL(T || a T + (1 - a) S)`` of each row.

    At most ``tau^2 log(1 / a)``, whatever the student says.

    Temperature: with Hinton's tau^2 (see `kl`).

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        temperature: tau.
        skew: a, from 0, which is the forward KL, to below 1, where nothing is left to learn.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: Ko et al., DistiLLM (ICML 2024), arXiv:2402.03898, section 3.1.

    *Departs from the paper*: the factor tau^2; the paper has no temperature.
    """
    _check_skew(skew)
    log_student_NV, log_teacher_NV = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _skewed(log_teacher_NV, log_student_NV, skew)


def skewed_reverse_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Float[Tensor, " N"]:
    """``tau^2 KL(S || a S + (1 - a) T)`` of each row; `skewed_kl` the other way round.

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        temperature: tau.
        skew: a, from 0, which is the reverse KL, to below 1.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: Ko et al., DistiLLM (ICML 2024), arXiv:2402.03898, section 3.1.

    *Departs from the paper*: the factor tau^2; the paper has no temperature.
    """
    _check_skew(skew)
    log_student_NV, log_teacher_NV = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _skewed(log_student_NV, log_teacher_NV, skew)


def _skewed(log_p_NV: Tensor, log_q_NV: Tensor, skew: float) -> Tensor:
    return kl_divergence(log_p_NV, log_mixture(log_p_NV, log_q_NV, skew) if skew else log_q_NV)


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"skew={skew} is not at least 0 and below 1; the paper uses 0.1")
