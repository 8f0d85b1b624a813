"""From what the student's head reads, or says, to the mean loss: fused where there is such a form."""

# N rows, D hidden width, C classes

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from .fused import Head, TeacherStates, fused_loss
from .losses import cached_top_k_kl, masked_mean, softcap
from .recipe import DistillationRecipe
from .teachers import Said, TopK

NumItems = int | Int[Tensor, ""]


def distillation_loss(
    recipe: DistillationRecipe,
    student: Float[Tensor, "N X"],
    head: Head | None,
    said: Said,
    labels_N: Int[Tensor, " N"],
    num_items: NumItems | None,
) -> Float[Tensor, ""]:
    """Compute the recipe's L, unweighted.

    Args:
        recipe: Names it.
        student: Hidden states of the rows that count, with `head`; or logits, without.
        head: The student's.
        said: What the teacher says of the same rows.
        labels_N: Theirs.
        num_items: What the sum over rows is divided by; N by default.

    Raises:
        ValueError: Teacher and student have other rows or classes than each other.
    """
    objective = recipe.objective()
    if head is not None and objective is not None and not isinstance(said, TopK):
        return fused_loss(student, head, objective, teacher=said, num_items=num_items)
    logits_NC = student if head is None else dense_logits(student, head)
    if isinstance(said, TopK):
        arguments = {name: value for name, value in recipe.arguments.items() if name != "k"}
        return masked_mean(cached_top_k_kl(logits_NC, said.log_probs, said.ids, **arguments), num_items)
    if isinstance(said, TeacherStates):
        with torch.no_grad():
            said = dense_logits(said.hidden, said.head)
    labelled = {"labels_N": labels_N} if recipe.method.needs_labels else {}
    return masked_mean(recipe.rows_loss()(logits_NC, said, **labelled), num_items)


def dense_logits(hidden: Float[Tensor, "N D"], head: Head) -> Float[Tensor, "N C"]:
    """All logits of some hidden states."""
    bias = None if head.bias is None else head.bias[: head.width].to(hidden.dtype)
    product_NC = linear(hidden, head.weight[: head.width].to(hidden.dtype), bias)
    return softcap(product_NC * head.scale if head.scale != 1 else product_NC, head.softcap)


def cross_entropy_mean(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], num_items: NumItems | None
) -> Float[Tensor, ""]:
    """The labels' loss."""
    return masked_mean(cross_entropy(logits.float(), labels, reduction="none"), num_items)


def likeliest(said: Tensor | TeacherStates, k: int) -> TopK:
    """Keep the k likeliest tokens of each row, logits being made of a few rows at a time.

    Raises:
        ValueError: There are not so many tokens.
    """
    num_rows, width = said.shape if isinstance(said, Tensor) else (len(said.hidden), said.head.width)
    if not 1 <= k <= width:
        raise ValueError(f"top_k={k} is not between 1 and the teacher's {width} tokens")
    parts = []
    for start in range(0, max(num_rows, 1), LIKELIEST_ROWS):
        some = slice(start, start + LIKELIEST_ROWS)
        logits = said[some] if isinstance(said, Tensor) else dense_logits(said.hidden[some], said.head)
        parts.append(logits.float().log_softmax(-1).topk(k, dim=-1))
    return TopK(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


LIKELIEST_ROWS = 256
"""At V = 151,936 in single precision 156 MB."""
