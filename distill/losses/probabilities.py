"""Distributions in log space, from which the losses of the KL family are made."""

# N rows, V vocabulary, K chosen classes

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_same_classes, check_temperature
from .logits import common_dtype


def log_probabilities(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"], temperature: float
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """``log softmax(z / tau)`` of both sides, in at least single precision; the teacher's is a constant.

    Raises:
        ValueError: The shapes differ, or tau is not a finite number above 0.
    """
    check_temperature(temperature)
    check_same_classes(student_logits, teacher_logits)
    wide = common_dtype(student_logits, teacher_logits)
    return (
        tempered_log_softmax(student_logits, temperature, wide),
        tempered_log_softmax(teacher_logits.detach(), temperature, wide),
    )


def tempered_log_softmax(
    logits_NV: Float[Tensor, "N V"], temperature: float, dtype: torch.dtype
) -> Float[Tensor, "N V"]:
    """``log softmax(z / tau)`` in the given precision."""
    if temperature == 1:  # one pass, without a wide copy of the logits
        return logits_NV.log_softmax(-1, dtype=dtype)
    return (logits_NV.to(dtype) / temperature).log_softmax(-1)


def kl_divergence(log_p_NV: Float[Tensor, "N V"], log_q_NV: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """``KL(p || q) = sum_k p_k (log p_k - log q_k)`` of each row, from finite log-probabilities."""
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def log_mixture(
    log_p_NV: Float[Tensor, "N V"], log_q_NV: Float[Tensor, "N V"], share: float
) -> Float[Tensor, "N V"]:
    """``log(a p + (1 - a) q)``, for a share a strictly between 0 and 1."""
    return torch.logaddexp(log_p_NV + math.log(share), log_q_NV + math.log1p(-share))


def rest_logit(logits_NV: Float[Tensor, "N V"], ids_NK: Int[Tensor, "N K"]) -> Float[Tensor, "N 1"]:
    """The logit of all classes but K, as one: ``log sum_{k not in ids} exp(z_k)``.

    Summed over the rest itself: one minus the mass of the chosen would cancel where they have nearly all.
    """
    return logits_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1, keepdim=True)
