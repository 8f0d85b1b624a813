"""From what the student's head reads, or says, to the mean loss; and logits a few rows at a time."""

# N rows, D hidden width, C classes; R rows of a tile

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from .fused import Head, TeacherStates, fused_loss
from .losses import masked_mean, softcap
from .recipe import DistillationRecipe
from .teachers import Said, TopK

NumItems = int | Int[Tensor, ""]
TILE_ROWS = 256
"""Rows whose logits exist at a time: at V = 151,936 in single precision 156 MB."""


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
        student: Hidden states of the rows that count, with `head`, whose logits are made in tiles; or logits,
            without.
        head: The student's.
        said: What the teacher says of the same rows.
        labels_N: Theirs.
        num_items: What the sum over rows is divided by; N by default.

    Raises:
        ValueError: Teacher and student have other rows or classes than each other.
    """
    if head is not None:
        objective = recipe.objective(by_likeliest=isinstance(said, TopK))
        labels = labels_N if objective.needs_labels else None
        return fused_loss(student, head, objective, teacher=said, labels=labels, num_items=num_items)
    if isinstance(said, TopK):
        return masked_mean(recipe.likeliest_loss()(student, said.log_probs, said.ids), num_items)
    if isinstance(said, TeacherStates):
        with torch.no_grad():
            said = dense_logits(said.hidden, said.head)
    labelled = {"labels_N": labels_N} if recipe.method.needs_labels else {}
    return masked_mean(recipe.rows_loss()(student, said, **labelled), num_items)


def dense_logits(hidden: Float[Tensor, "N D"], head: Head) -> Float[Tensor, "N C"]:
    """All logits of some hidden states."""
    bias = None if head.bias is None else head.bias[: head.width].to(hidden.dtype)
    product_NC = linear(hidden, head.weight[: head.width].to(hidden.dtype), bias)
    return softcap(product_NC * head.scale if head.scale != 1 else product_NC, head.softcap)


def logit_tiles(said: Tensor | TeacherStates) -> Iterator[Float[Tensor, "R C"]]:
    """Give the logits of a few rows after the other, in single precision; without rows, one tile of none."""
    num_rows = len(said) if isinstance(said, Tensor) else len(said.hidden)
    for start in range(0, max(num_rows, 1), TILE_ROWS):
        some = slice(start, start + TILE_ROWS)
        logits = said[some] if isinstance(said, Tensor) else dense_logits(said.hidden[some], said.head)
        yield logits.float()


def cross_entropy_mean(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], num_items: NumItems | None
) -> Float[Tensor, ""]:
    """The labels' loss."""
    return masked_mean(cross_entropy(logits.float(), labels, reduction="none"), num_items)


@torch.no_grad()
def label_measures(said: Tensor | TeacherStates, labels_N: Int[Tensor, " N"]) -> Float[Tensor, "N 3"]:
    """Of each row: its label's -log p in nats, 1, and whether the answer is right."""
    parts = []
    for logits, labels in zip(logit_tiles(said), labels_N.split(TILE_ROWS), strict=True):
        loss = cross_entropy(logits, labels, reduction="none")
        parts.append(torch.stack([loss, torch.ones_like(loss), (logits.argmax(-1) == labels).float()], 1))
    return torch.cat(parts)


def likeliest(said: Tensor | TeacherStates, k: int) -> TopK:
    """Keep the k likeliest tokens of each row, logits being made of a few rows at a time.

    Raises:
        ValueError: There are not so many tokens.
    """
    width = said.shape[1] if isinstance(said, Tensor) else said.head.width
    if not 1 <= k <= width:
        raise ValueError(f"top_k={k} is not between 1 and the teacher's {width} tokens")
    parts = [logits.log_softmax(-1).topk(k, dim=-1) for logits in logit_tiles(said)]
    return TopK(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))
