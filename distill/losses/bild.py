"""BiLD: the differences between the likeliest tokens' logits, chosen by the teacher and by the student."""

# N rows, V vocabulary, K chosen tokens, Q their pairs

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_temperature, check_top_k
from .logits import comparable
from .probabilities import kl_divergence


def bild(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 3.0,
    k: int = 8,
) -> Float[Tensor, " N"]:
    """``tau^2 (KL(P_T || P_S) + KL(Q_T || Q_S))`` of each row.

    P is over the teacher's k likeliest tokens, Q over the student's. Each is the softmax of
    ``(z_i - z_j) / tau`` over all pairs i < j, in the order of whoever chose; the first argument of KL is the
    teacher's. The long tail of a vocabulary, which is mostly noise, has no say, and neither has a constant.

    Temperature: with the factor tau^2, as for the other losses.

    Args:
        student_logits: Before any softmax.
        teacher_logits: A constant.
        temperature: tau.
        k: Tokens to choose, from 3, because 2 make a single pair, to V.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: Li et al., BiLD (COLING 2025), arXiv:2406.13555.

    *Departs from the paper*: the release has no factor tau^2.
    """
    check_temperature(temperature)
    check_top_k(k, student_logits.shape[-1], smallest=3)
    student_NV, teacher_NV = comparable(student_logits, teacher_logits)
    loss_N = student_NV.new_zeros(student_NV.shape[0])
    for leader_NV in (teacher_NV, student_NV.detach()):
        ids_NK = leader_NV.topk(k, dim=-1).indices
        log_teacher_NQ = _log_pairs(teacher_NV, ids_NK, temperature)
        loss_N = loss_N + kl_divergence(log_teacher_NQ, _log_pairs(student_NV, ids_NK, temperature))
    return temperature**2 * loss_N


def _log_pairs(
    logits_NV: Float[Tensor, "N V"], ids_NK: Int[Tensor, "N K"], temperature: float
) -> Float[Tensor, "N Q"]:
    """Log-softmax over the differences of all pairs of the chosen tokens."""
    chosen_NK = logits_NV.gather(-1, ids_NK) / temperature
    first_Q, second_Q = torch.triu_indices(ids_NK.shape[1], ids_NK.shape[1], 1, device=ids_NK.device)
    return (chosen_NK[:, first_Q] - chosen_NK[:, second_Q]).log_softmax(-1)
