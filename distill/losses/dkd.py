"""DKD: the label's probability and the distribution over all other classes, each with a weight of its own."""

# N rows, C classes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_temperature, check_weight
from .logits import comparable
from .probabilities import kl_divergence, rest_logit


def dkd(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    labels_N: Int[Tensor, " N"],
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Float[Tensor, " N"]:
    """``tau^2 (alpha TCKD + beta NCKD)`` of each row.

    TCKD is KL of (label, not label), NCKD is KL of the distributions given that it is not the label. The
    plain KL is alpha = 1 with ``1 - T_label`` in place of beta, so that a sure teacher says little about the
    other classes; here each says as much.

    Temperature: with the factor tau^2, as in the paper.

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        labels_N: The true classes.
        temperature: tau.
        alpha: Weight of TCKD, at least 0.
        beta: Weight of NCKD, at least 0.

    Raises:
        ValueError: Fewer than 3 classes, labels that are not classes, shapes that differ, or an argument out
            of its range.

    Reference: Zhao et al., Decoupled Knowledge Distillation (CVPR 2022), arXiv:2203.08679.
    """
    check_temperature(temperature)
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    student_NC, teacher_NC = comparable(student_logits, teacher_logits)
    _check_labels(labels_N, student_NC)
    student_NC, teacher_NC = student_NC / temperature, teacher_NC / temperature
    ids_N1 = labels_N.long()[:, None]
    student_rest_N1, teacher_rest_N1 = rest_logit(student_NC, ids_N1), rest_logit(teacher_NC, ids_N1)
    student_two_N2 = torch.cat([student_NC.gather(-1, ids_N1), student_rest_N1], dim=-1)
    teacher_two_N2 = torch.cat([teacher_NC.gather(-1, ids_N1), teacher_rest_N1], dim=-1)
    tckd_N = kl_divergence(teacher_two_N2.log_softmax(-1), student_two_N2.log_softmax(-1))
    log_others_NC = teacher_NC - teacher_rest_N1  # of the label too, whose probability then is set to 0
    others_NC = log_others_NC.exp().scatter(-1, ids_N1, 0.0)
    nckd_N = (others_NC * (log_others_NC - (student_NC - student_rest_N1))).sum(-1)
    return temperature**2 * (alpha * tckd_N + beta * nckd_N)


def _check_labels(labels_N: Tensor, logits_NC: Tensor) -> None:
    num_rows, num_classes = logits_NC.shape
    if num_classes < 3:
        raise ValueError(
            f"got logits of {num_classes} classes; dkd compares those that are not the label, so it needs at "
            "least 3. Use kl or binary_kl_norm"
        )
    if labels_N.shape != (num_rows,):
        raise ValueError(
            f"got labels of shape {tuple(labels_N.shape)} for {num_rows} rows of logits; give one a row"
        )
    if num_rows and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        raise ValueError(
            f"labels from {int(labels_N.min())} to {int(labels_N.max())} are not all between 0 and "
            f"{num_classes - 1}; take out ignored rows first, for language models with valid_rows"
        )
