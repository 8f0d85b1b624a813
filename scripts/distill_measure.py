"""How near a student has come to its teacher, on held-out examples."""

# N rows that count, C classes

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from ..distill.counted import counted_rows
from ..distill.losses import kl
from ..distill.teachers import model_inputs
from ..moe.evaluating import evaluating

NUM_SUMS = 7
ROWS = 512
"""Rows whose log-probabilities exist at a time."""

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
    with evaluating(teacher), evaluating(student):
        for batch in tqdm(batches, "comparing with the teacher", disable=not shows_progress, unit="batch"):
            rows = counted_rows(batch, is_language_model=is_language_model)
            labels = batch["labels"] if rows is None else rows.labels
            theirs = teacher(**_on(teacher, batch.get("teacher_inputs") or model_inputs(batch))).logits
            ours = student(**_on(student, model_inputs(batch))).logits
            if rows is not None:
                theirs, ours = rows.pack(theirs), rows.pack(ours)
            total += _sums(theirs[:, :num_columns], ours[:, :num_columns].to(theirs.device), labels)
    count, *sums = total.tolist()
    means = [value / max(count, 1) for value in sums]
    return Agreement(int(count), *means)


def _sums(
    theirs_NC: Float[Tensor, "N C"], ours_NC: Float[Tensor, "N C"], labels_N: Int[Tensor, " N"]
) -> Float[Tensor, " 7"]:
    """The sums of which `Agreement` has the means, in its order; a few rows at a time."""
    total = torch.zeros(NUM_SUMS, dtype=torch.float64)
    for start in range(0, len(labels_N), ROWS):
        some = slice(start, start + ROWS)
        teacher, student = theirs_NC[some].float(), ours_NC[some].float()
        labels = labels_N[some].to(teacher.device)
        answers = teacher.argmax(-1)
        columns = [torch.ones_like(labels)]
        for logits in (student, teacher):
            columns += [cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels]
        columns += [kl(student, teacher), answers == student.argmax(-1)]
        total += torch.stack([column.double().cpu() for column in columns]).sum(1)
    return total


def _on(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(model.device) for key, value in inputs.items()}
