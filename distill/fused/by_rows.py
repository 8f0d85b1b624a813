"""Any loss that has one value for each row of logits, in chunks of rows."""

# R rows, C columns

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .objective import Objective, Tile


def by_rows(
    loss: Callable[..., Tensor],
    *,
    needs_labels: bool = False,
    compares_columns: bool = True,
    needs_ids: bool = False,
) -> Objective:
    """Compute a dense loss of a few rows at a time, and let autograd derive it there and then.

    Nothing of a tile's graph is left when the next tile begins. A derivative written by hand needs fewer
    tensors of a tile's size.

    Args:
        loss: Of the student's logits ``[R, C]`` and the teacher's, one value for each row, of no other row's
            logits; with the rows' ``labels_N``, if it needs them. Such are those of `moekit.distill.losses`.
        needs_labels: Whether it takes labels.
        compares_columns: Whether the teacher has the student's columns; else it may have any.
        needs_ids: Whether the teacher is a `TopK`, whose ids come behind its log-probabilities.
    """

    def rule(tile: Tile) -> tuple[Tensor, Tensor]:
        labelled: dict[str, Any] = {"labels_N": tile.labels} if needs_labels else {}
        ids = () if tile.teacher_ids is None else (tile.teacher_ids,)
        with torch.enable_grad():
            student_RC = tile.student.detach().requires_grad_()
            loss_R = loss(student_RC, tile.teacher, *ids, **labelled)
            (gradient_RC,) = torch.autograd.grad(loss_R.sum(), student_RC)
        return loss_R.detach(), gradient_RC.contiguous()

    return Objective(
        rule=rule, needs_labels=needs_labels, compares_columns=compares_columns, needs_ids=needs_ids
    )
