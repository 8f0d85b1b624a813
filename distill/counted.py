"""Which rows of a training batch count, by the one rule that losses, teachers and caches go by."""

from collections.abc import Mapping
from typing import Any

from .losses import ValidRows, valid_rows, valid_tokens
from .losses.rows import IGNORE_INDEX

TEACHER_POSITIONS = "teacher_positions"


def counted_rows(batch: Mapping[str, Any], *, is_language_model: bool) -> ValidRows | None:
    """Find the positions at which student and teacher are compared; ``None`` where each example is one row.

    Args:
        batch: With ``labels``, perhaps ``attention_mask``, and perhaps ``teacher_positions`` ``[B, S]``, -1
            where a teacher with another tokenizer has none.
        is_language_model: Whether labels are those of the next position.
    """
    labels = batch["labels"]
    if labels.ndim == 1:
        return None
    if (positions_BS := batch.get(TEACHER_POSITIONS)) is not None:
        # Position s is compared through the label of s + 1, which is left out where the teacher has none.
        labels = labels.clone()
        labels[:, 1:].masked_fill_(positions_BS[:, :-1] < 0, IGNORE_INDEX)
    find = valid_rows if is_language_model else valid_tokens
    return find(labels, batch.get("attention_mask"))


def labelled_rows(batch: Mapping[str, Any], *, is_language_model: bool) -> ValidRows | None:
    """Find the positions that have a label, whether or not the teacher has them too.

    Args:
        batch: See `counted_rows`.
        is_language_model: Whether labels are those of the next position.
    """
    own = {name: value for name, value in batch.items() if name != TEACHER_POSITIONS}
    return counted_rows(own, is_language_model=is_language_model)
