"""How near a student has come to its teacher, on held-out examples."""

# N rows that count, C classes; R rows of a tile

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from ..distill import task_head
from ..distill.counted import counted_rows
from ..distill.fused import TeacherStates
from ..distill.head_losses import TILE_ROWS, logit_tiles
from ..distill.language_head import hidden_states, logit_scale, scaled_head
from ..distill.losses import ValidRows, kl
from ..distill.teachers import model_inputs
from ..moe.evaluating import evaluating

NUM_SUMS = 7

Measures = dict[str, float | int]
"""By name; see `Agreement`."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over held-out rows."""

    rows: int
    cross_entropy: float
    accuracy: float
    teacher_cross_entropy: float
    teacher_accuracy: float
    kl: float
    """KL(teacher || student), nats."""
    top1_agreement: float


def agreement(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    *,
    is_language_model: bool,
    num_columns: int | None,
    shows_progress: bool,
) -> Agreement:
    """Run both models on the same batches, both on their devices.

    Args:
        teacher: With the student's classes.
        student: The plain model.
        batches: Of `DistillRows`.
        is_language_model: Whether labels are those of the next position.
        num_columns: Tokens that both know; all by default.
        shows_progress: Whether to.
    """
    total = torch.zeros(NUM_SUMS, dtype=torch.float64)
    of_teacher, of_student = (
        _answers(model, num_columns, is_language_model=is_language_model) for model in (teacher, student)
    )
    with evaluating(teacher), evaluating(student):
        for batch in tqdm(batches, "comparing with the teacher", disable=not shows_progress, unit="batch"):
            rows = counted_rows(batch, is_language_model=is_language_model)
            labels = batch["labels"] if rows is None else rows.labels
            theirs = of_teacher(batch.get("teacher_inputs") or model_inputs(batch), rows)
            total += _sums(theirs, of_student(model_inputs(batch), rows), labels)
    count, *sums = total.tolist()
    means = [value / max(count, 1) for value in sums]
    return Agreement(int(count), *means)


def _answers(
    model: PreTrainedModel, num_columns: int | None, *, is_language_model: bool
) -> Callable[[dict[str, Any], ValidRows | None], Tensor | TeacherStates]:
    """What a model says of the rows of a batch: logits, or a language model's hidden states with its head."""
    head = task_head(model)
    of_states = scaled_head(logit_scale(model), head.linear, num_columns) if is_language_model else None

    def answer(inputs: dict[str, Any], rows: ValidRows | None) -> Tensor | TeacherStates:
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        if of_states is not None and rows is not None:
            return TeacherStates(rows.pack(hidden_states(model, head, inputs)), of_states)
        logits = model(**inputs).logits
        return (logits if rows is None else rows.pack(logits))[:, :num_columns]

    return answer


def _sums(
    theirs: Tensor | TeacherStates, ours: Tensor | TeacherStates, labels_N: Int[Tensor, " N"]
) -> Float[Tensor, " 7"]:
    """The sums of which `Agreement` has the means, in its order; a few rows at a time."""
    total = torch.zeros(NUM_SUMS, dtype=torch.float64)
    tiles = zip(logit_tiles(theirs), logit_tiles(ours), labels_N.split(TILE_ROWS), strict=True)
    for teacher, student, labels in tiles:
        student, labels = student.to(teacher.device), labels.to(teacher.device)
        answers = teacher.argmax(-1)
        columns = [torch.ones_like(labels)]
        for logits in (student, teacher):
            columns += [cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels]
        columns += [kl(student, teacher), answers == student.argmax(-1)]
        total += torch.stack([column.double() for column in columns]).sum(1).cpu()
    return total
