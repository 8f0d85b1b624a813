"""The generalised Jensen-Shannon divergence of GKD, between the two directions of KL."""

# N rows, V vocabulary

from jaxtyping import Float
from torch import Tensor

from .probabilities import kl_divergence, log_mixture, log_probabilities


def jsd(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    """``tau^2 (b KL(T || M) + (1 - b) KL(S || M))`` of each row, with ``M = b T + (1 - b) S``.

    The formula itself is 0 at both ends. Divided by b it tends to the forward KL as b falls to 0, and divided
    by 1 - b to the reverse KL as b rises to 1; so b = 0 and b = 1 mean those, as in GKD. Near the ends the
    loss is therefore small: a b of 0.01 wants about 100 times the weight of b = 0.

    Temperature: with Hinton's tau^2 (see `kl`); TRL leaves the factor out.

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        temperature: tau.
        beta: b, from 0 to 1.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: Agarwal et al., GKD (ICLR 2024), arXiv:2306.13649.

    *Departs from the paper*: the factor tau^2.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is not between 0 (forward KL) and 1 (reverse KL)")
    log_student_NV, log_teacher_NV = log_probabilities(student_logits, teacher_logits, temperature)
    if beta == 0:
        return temperature**2 * kl_divergence(log_teacher_NV, log_student_NV)
    if beta == 1:
        return temperature**2 * kl_divergence(log_student_NV, log_teacher_NV)
    log_middle_NV = log_mixture(log_teacher_NV, log_student_NV, beta)
    from_teacher_N = kl_divergence(log_teacher_NV, log_middle_NV)
    from_student_N = kl_divergence(log_student_NV, log_middle_NV)
    return temperature**2 * (beta * from_teacher_N + (1 - beta) * from_student_N)
