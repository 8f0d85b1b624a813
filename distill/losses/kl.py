"""The Kullback-Leibler divergence of whole distributions, in both directions."""

# N rows, V vocabulary

from jaxtyping import Float
from torch import Tensor

from .probabilities import kl_divergence, log_probabilities


def kl(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"], *, temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """Forward: ``tau^2 KL(T || S)`` of each row, T and S the softmax of ``z / tau``.

    The student is to cover whatever the teacher finds likely.

    Temperature: with Hinton's tau^2, so that gradients do not fall as 1/tau^2. TRL's trainers leave the
    factor out: divide a weight of theirs by tau^2 to get the same here.

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        temperature: tau.

    Raises:
        ValueError: Shapes that differ, or tau is not a finite number above 0.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """
    log_student_NV, log_teacher_NV = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl_divergence(log_teacher_NV, log_student_NV)


def reverse_kl(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"], *, temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """Reverse: ``tau^2 KL(S || T)`` of each row, T and S the softmax of ``z / tau``.

    The student is to leave alone whatever the teacher finds unlikely.

    Temperature: as in `kl`.

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        temperature: tau.

    Raises:
        ValueError: Shapes that differ, or tau is not a finite number above 0.

    Reference: MiniLLM, arXiv:2306.08543.

    *Departs from the paper*: the divergence of each next-token distribution on given text, without the policy
    gradient over the student's own sequences.
    """
    log_student_NV, log_teacher_NV = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl_divergence(log_student_NV, log_teacher_NV)
