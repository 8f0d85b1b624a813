"""The one loop over tiles that all losses share."""

# N rows, D hidden width; R rows and c columns of a tile, r rows of a block

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .centring import Means
from .gradients import Gradients
from .heads import Head, Teacher, TeacherStates, TopK, wide
from .objective import Objective, Rule, Tile
from .sides import Cut, HeadSide, teacher_cut, teacher_side
from .tiles import blocks, tiles


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """All of a loss but the hidden states; it fits together already."""

    head: Head
    objective: Objective
    teacher: Teacher | None
    labels: Int[Tensor, " N"] | None
    scale: float
    """Factor of the sum over rows."""
    dtype: torch.dtype
    """Of the student's matrix products."""
    is_autocast: bool
    """Whether the teacher's have it too, whatever its hidden states have."""
    tile_elements: int | None

    @property
    def splits_columns(self) -> bool:
        """Whether tiles need not have whole rows. Behind a softcap the mean logit is no product."""
        teacher_head = self.teacher.head if isinstance(self.teacher, TeacherStates) else None
        is_capped = any(head is not None and head.softcap for head in (self.head, teacher_head))
        return self.objective.column_rule is not None and not (self.objective.is_centred and is_capped)

    @property
    def rule(self) -> Rule:
        """The objective's rule for these tiles."""
        column_rule = self.objective.column_rule
        return column_rule if column_rule is not None and self.splits_columns else self.objective.rule


@torch.no_grad()
def sweep(
    hidden: Float[Tensor, "N D"], job: Job, wanted: tuple[bool, bool, bool]
) -> tuple[Float[Tensor, ""], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Compute the loss and its gradients by hidden states, weight and bias in one sweep over tiles.

    Args:
        hidden: The student's.
        job: The rest.
        wanted: Which gradients to compute; with none, no product but that of the logits is made.
    """
    whole_rows, num_rows = not job.splits_columns, len(hidden)
    cut = tiles(num_rows, job.head.width, whole_rows=whole_rows, tile_elements=job.tile_elements)
    is_one_sum = all(rows == slice(0, num_rows) for rows, _ in cut)
    with torch.autocast(hidden.device.type, enabled=False):
        states_ND = hidden.to(job.dtype)
        # Tiles of whole rows multiply with the whole weight again and again: it is cast once.
        head = job.head.cast(job.dtype) if whole_rows else job.head
        gradients = Gradients(
            states_ND, job.head, wanted, factor=head.weight, scale=job.scale, is_one_sum=is_one_sum
        )
        is_centred = job.objective.is_centred and not whole_rows
        means = Means(states_ND, job.head, job.teacher) if is_centred else None
        loss_N = _sweep_tiles(HeadSide(states_ND, head, cut), job, cut, gradients, means)
        if means is not None:
            gradients.centre_(means.slope_N, means.weight_D)
        return loss_N.sum().mul_(job.scale), gradients.finish(hidden.dtype)


def _sweep_tiles(student: HeadSide, job: Job, cut: Cut, gradients: Gradients, means: Means | None) -> Tensor:
    """Loss of each row; the buffers of both sides end with this function, before gradients are cast."""
    their_cut = teacher_cut(job.teacher, cut, whole_rows=not job.splits_columns)
    teacher = teacher_side(job.teacher, student, their_cut, job.dtype if job.is_autocast else None)
    ids_NK = job.teacher.ids if isinstance(job.teacher, TopK) else None
    loss_N = student.states_ND.new_zeros(len(student.states_ND), dtype=wide(job.dtype))
    no_labels = loss_N.new_empty(0, dtype=torch.long)
    for (rows, columns), their_part in zip(cut, their_cut, strict=True):
        ours_Rc, theirs_Rc = student.product(rows, columns), teacher.product(*their_part)
        shift_R = None if means is None else means.shift_N[rows]
        labels_R = None if job.labels is None else job.labels[rows]
        for block in blocks(len(ours_Rc), ours_Rc.shape[1], ours_Rc.device):
            logits_rc = student.logits(ours_Rc[block])
            if shift_R is not None:
                logits_rc.sub_(shift_R[block, None])
            labels_r = no_labels if labels_R is None else labels_R[block]
            ids_rK = None if ids_NK is None else ids_NK[rows][block]
            tile = Tile(logits_rc, teacher.logits(theirs_Rc[block]), labels_r, job.head.width, ids_rK)
            loss_r, slope_rc = job.rule(tile)
            loss_N[rows][block].add_(loss_r)
            if gradients.is_wanted:  # the product is no longer needed: its place takes the derivative
                ours_Rc[block].copy_(job.head.through_cap_(slope_rc, logits_rc))
        if gradients.is_wanted:
            gradients.add(ours_Rc, rows, columns)
            if means is not None:
                means.add(ours_Rc, rows)
    return loss_N
