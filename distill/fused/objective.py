"""What a loss has to say about itself to be computed in chunks."""

# R rows of a tile, C columns of it

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A piece of the logits, finished: scaled, capped, without padded columns; to be read only."""

    student: Float[Tensor, "R C"]
    teacher: Float[Tensor, "R c"]
    """No columns without a teacher."""
    labels: Int[Tensor, " r"]
    """Empty without labels."""
    num_columns: int
    """Of the whole row."""
    teacher_ids: Int[Tensor, "R c"] | None = None
    """Which token each column of a teacher by its likeliest tokens is; those are its log-probabilities."""


Rule = Callable[[Tile], tuple[Tensor, Tensor]]
"""Loss of each row, ``[R]``, and its derivative by the student's logits, ``[R, C]``, both new tensors."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective:
    """A loss of one head."""

    rule: Rule
    """On whole rows."""
    column_rule: Rule | None = None
    """On any columns, where the loss is a sum over them: the cheaper way, since the weight's gradient is
    written once. Its logits have been centred already, if `is_centred`."""
    is_centred: bool = False
    """Whether `column_rule` wants each row's mean taken off the logits of both sides."""
    needs_teacher: bool = True
    needs_labels: bool = False
    compares_columns: bool = True
    """Whether the teacher has to have the student's columns; else it may have any, and rows are whole."""
    needs_ids: bool = False
    """Whether the teacher is a `TopK`."""


def weighted_sum(*terms: tuple[float, Objective]) -> Objective:
    """Add losses of one head, each times its weight; they share one pass over the logits.

    Raises:
        ValueError: There are no terms.
    """
    if not terms:
        raise ValueError("a sum of no terms; give at least one (weight, objective)")

    def rule(tile: Tile) -> tuple[Tensor, Tensor]:
        (weight, objective), *others = terms
        loss_R, gradient_RC = objective.rule(tile)
        loss_R, gradient_RC = loss_R * weight, gradient_RC.mul_(weight) if weight != 1 else gradient_RC
        for other_weight, other in others:
            other_loss_R, other_gradient_RC = other.rule(tile)
            loss_R.add_(other_loss_R, alpha=other_weight)
            gradient_RC.add_(other_gradient_RC, alpha=other_weight)
        return loss_R, gradient_RC

    return Objective(
        rule=rule,
        needs_teacher=any(objective.needs_teacher for _, objective in terms),
        needs_labels=any(objective.needs_labels for _, objective in terms),
        compares_columns=any(o.needs_teacher and o.compares_columns for _, o in terms),
        needs_ids=any(objective.needs_ids for _, objective in terms),
    )
