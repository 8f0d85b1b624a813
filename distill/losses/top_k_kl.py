"""Forward KL over the teacher's k likeliest tokens: from full logits, or from a cache that kept no more."""

# N rows, V vocabulary, K kept tokens

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_choice, check_temperature, check_top_k
from .logits import common_dtype, comparable
from .probabilities import kl_divergence, rest_logit

RESTS = ("class", "renormalise")


def top_k_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 1.0,
    k: int = 64,
    rest: str = "class",
) -> Float[Tensor, " N"]:
    """``tau^2 KL(T || S)`` of each row, over the teacher's k likeliest tokens.

    What happens to all other tokens:

    - ``class``: they are one more class, so that the student learns how much the teacher leaves to them, but
      not to which. A lower bound of the full KL at tau = 1.
    - ``renormalise``: they do not exist; both distributions are those given that one of the k comes next. The
      student may then give any mass to the others: a loss to be used beside the labels' cross-entropy.

    With k = V there are no others, and both are the full KL.

    Temperature: with Hinton's tau^2 (see `kl`). The classes are tempered after the others have become one:
    a cache does not know what tau would do to each of them.

    Args:
        student_logits: Before any softmax; finite.
        teacher_logits: A constant; finite.
        temperature: tau.
        k: Tokens to compare; from 1 with ``class``, from 2 with ``renormalise``, to V.
        rest: One of the two above.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: on the bias of top-k teachers, Sparse Logit Sampling, arXiv:2503.16870.
    """
    _check(k, student_logits.shape[-1], temperature, rest)
    student_NV, teacher_NV = comparable(student_logits, teacher_logits)
    ids_NK = teacher_NV.topk(k, dim=-1).indices
    return _tempered_kl(_chosen(student_NV, ids_NK, rest), _chosen(teacher_NV, ids_NK, rest), temperature)


def cached_top_k_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_log_probs_NK: Float[Tensor, "N K"],
    teacher_ids_NK: Int[Tensor, "N K"],
    *,
    temperature: float = 1.0,
    rest: str = "class",
) -> Float[Tensor, " N"]:
    """`top_k_kl` from what a cache keeps of the teacher.

    Args:
        student_logits: Before any softmax; finite.
        teacher_log_probs_NK: Of temperature 1 over the teacher's whole vocabulary, at most 0, in any order. A
            cache of low precision may round their sum to more than 1; the rest then counts as nearly nothing.
        teacher_ids_NK: Which token each belongs to, all different in a row.
        temperature: tau, applied here.
        rest: As there.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.
    """
    if teacher_log_probs_NK.shape != teacher_ids_NK.shape or len(student_logits) != len(teacher_ids_NK):
        raise ValueError(
            f"got student logits of shape {tuple(student_logits.shape)}, log-probabilities of shape "
            f"{tuple(teacher_log_probs_NK.shape)} and ids of shape {tuple(teacher_ids_NK.shape)}; "
            "the first is rows by vocabulary, the others rows by k, of the same rows"
        )
    num_kept, num_tokens = teacher_ids_NK.shape[1], student_logits.shape[1]
    _check(num_kept, num_tokens, temperature, rest)
    wide = common_dtype(student_logits, teacher_log_probs_NK)
    teacher_NK = teacher_log_probs_NK.detach().to(wide)
    if rest == "class" and num_kept < num_tokens:
        # No further than single precision can tell from 1: the logarithm of nothing would be infinite.
        kept_N1 = teacher_NK.logsumexp(-1, keepdim=True).clamp_max(-torch.finfo(torch.float32).eps)
        teacher_NK = torch.cat([teacher_NK, (-kept_N1.expm1()).log()], dim=-1)
    student_NK = _chosen(student_logits.to(wide), teacher_ids_NK.long(), rest)
    return _tempered_kl(student_NK, teacher_NK, temperature)


def _chosen(logits_NV: Tensor, ids_NK: Tensor, rest: str) -> Tensor:
    """The logits of the K chosen tokens and, if it is a class, of all others together."""
    chosen_NK = logits_NV.gather(-1, ids_NK)
    if rest == "renormalise" or ids_NK.shape[1] == logits_NV.shape[1]:
        return chosen_NK
    return torch.cat([chosen_NK, rest_logit(logits_NV, ids_NK)], dim=-1)


def _tempered_kl(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    log_student_NK = (student_NK / temperature).log_softmax(-1)
    return temperature**2 * kl_divergence((teacher_NK / temperature).log_softmax(-1), log_student_NK)


def _check(k: int, num_classes: int, temperature: float, rest: str) -> None:
    check_temperature(temperature)
    check_choice("rest", rest, RESTS)
    # One class alone has probability 1 on either side, and there is nothing to learn.
    check_top_k(k, num_classes, smallest=1 if rest == "class" else 2)
