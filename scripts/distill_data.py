"""The rows of a distillation: the student's, their numbers, and what the teacher reads instead."""

# S positions

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..distill.token_alignment import align_text
from .train_data import ClassRows, known_inputs, read_picture

TEACHER = "teacher_inputs"
POSITIONS = "teacher_positions"


class DistillRows(Dataset[dict[str, Any]]):
    """Rows of a student with their numbers and, if a teacher reads something else, that.

    Args:
        rows: The student's.
        add_teacher: What to add to a row for the teacher; nothing by default.
    """

    def __init__(self, rows: Any, add_teacher: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None):
        self.rows = rows
        self.add_teacher = add_teacher

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {**self.rows[index], "row": index}
        return row if self.add_teacher is None else row | self.add_teacher(index, row)

    def without_teacher(self) -> "DistillRows":
        """The same for a teacher that is read from a cache; which positions it has stays."""
        if self.add_teacher is None or isinstance(self.rows, ClassRows):
            return DistillRows(self.rows)
        return self


def aligned_text(
    student: Any, teacher: Any, max_length: int
) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """For a teacher with another tokenizer: its tokens of a block, and where they belong."""

    def add(index: int, row: dict[str, Any]) -> dict[str, Any]:
        length = int(row["attention_mask"].sum())
        ids_S = row["input_ids"][row["attention_mask"] != 0]
        found = align_text(ids_S, student, teacher, max_length=max_length)
        positions_S = torch.full_like(row["input_ids"], -1)
        positions_S[:length] = found.teacher_positions
        return {TEACHER: {"input_ids": found.teacher_ids}, POSITIONS: positions_S}

    return add


def same_text(
    rows: ClassRows, processor: Any, kind: type[PreTrainedModel], max_length: int
) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """For a classifier with another tokenizer: the same text in its tokens."""

    def add(index: int, row: dict[str, Any]) -> dict[str, Any]:
        example = rows.rows[index]
        tokens = processor(example.text, example.pair, truncation=True, max_length=max_length)
        return {TEACHER: known_inputs(tokens, kind)}

    return add


def same_picture(rows: ClassRows, processor: Any) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """For a classifier with another image processor: the same picture as it sees it."""

    def add(index: int, row: dict[str, Any]) -> dict[str, Any]:
        return {TEACHER: {"pixel_values": read_picture(processor, rows.rows[index])}}

    return add


def collator(student: Callable[[Any], Any], teacher: Any = None) -> Callable[[Sequence[dict[str, Any]]], Any]:
    """Make batches of rows.

    Args:
        student: Makes batches of the student's own.
        teacher: The teacher's tokenizer or image processor, where it has inputs of its own.
    """
    pad = partial(default_data_collator, return_tensors="pt")
    if isinstance(teacher, PreTrainedTokenizerBase):
        pad = DataCollatorWithPadding(teacher)

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [dict(row) for row in rows]
        of_teacher = [row.pop(TEACHER, None) for row in rows]
        extra: dict[str, Tensor] = {}
        if POSITIONS in rows[0]:
            extra[POSITIONS] = torch.stack([row.pop(POSITIONS) for row in rows])
        if "row" in rows[0]:
            extra["row"] = torch.tensor([row.pop("row") for row in rows])
        batch = {**student(rows), **extra}
        if of_teacher[0] is not None:
            batch[TEACHER] = dict(pad(of_teacher))
        return batch

    return collate
