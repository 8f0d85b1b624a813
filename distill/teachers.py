"""What a teacher says of the rows that count."""

# B batch, S sequence, N rows that count, C classes

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .fused import Head, TeacherStates, TopK
from .language_head import NonFiniteLogitsError, hidden_states, logit_scale, scaled_head
from .losses import ValidRows
from .task_head import task_head

Said = Tensor | TeacherStates | TopK
"""Logits ``[N, C]``, hidden states with their head, or the likeliest tokens."""


class NonFiniteTeacherError(ValueError):
    """The teacher says NaN or infinity."""

    def __init__(self) -> None:
        super().__init__(
            "the teacher says NaN or infinity; load it in another dtype (--teacher-dtype float32), or take "
            "another teacher"
        )


@runtime_checkable
class Teacher(Protocol):
    """Says something of every row of a batch."""

    def says(self, batch: Mapping[str, Any], rows: ValidRows | None) -> Said:
        """Answer for a batch.

        Args:
            batch: The student's inputs; ``teacher_inputs`` where the teacher's own are others,
                ``teacher_positions`` ``[B, S]`` where its tokens are, and ``row`` ``[B]``, the numbers of
                the examples.
            rows: Which positions count; ``None`` where each example has one answer.
        """
        ...


class ModelTeacher:
    """A model in memory, in evaluation mode and without gradients.

    Args:
        model: A language model, or a classifier of the student's kind.
        num_columns: Tokens that the tokenizer knows, where the head has more.

    Raises:
        UnsupportedStudentError: The model has no head that could be read.
        NonFiniteTeacherError: A few tokens already make a language model say NaN or infinity.
    """

    def __init__(self, model: PreTrainedModel, *, num_columns: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task_head = task_head(model)
        self.is_language_model = model.get_output_embeddings() is not None
        self.head: Head | None = None
        if self.is_language_model:
            try:
                scale = logit_scale(model)
            except NonFiniteLogitsError as error:
                raise NonFiniteTeacherError from error
            self.head = scaled_head(scale, self.task_head.linear, num_columns)
        self.is_checked = False

    def says(self, batch: Mapping[str, Any], rows: ValidRows | None) -> Tensor | TeacherStates:
        """Run the model; a language model's logits are never made.

        Raises:
            NonFiniteTeacherError: The first batch already holds NaN or infinity.
        """
        inputs = batch.get("teacher_inputs") or model_inputs(batch)
        with torch.no_grad():
            if self.head is None:
                answer = self.model(**inputs).logits
                answer = said = answer if rows is None else rows.pack(answer)
            else:
                assert rows is not None
                states = hidden_states(self.model, self.task_head, dict(inputs))
                answer = _pack(states, rows, batch.get("teacher_positions"))
                said = TeacherStates(answer, self.head)
        if not self.is_checked:  # later batches show in the loss, which is watched without waiting for them
            check_said(answer)
            self.is_checked = True
        return said


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what only distillation knows of."""
    return {key: value for key, value in batch.items() if key not in OWN_KEYS}


OWN_KEYS = ("labels", "row", "teacher_inputs", "teacher_positions", "num_items_in_batch")


def check_said(answer: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteTeacherError: There is some.
    """
    if not torch.isfinite(answer).all():
        raise NonFiniteTeacherError


def _pack(states_BUD: Tensor, rows: ValidRows, positions_BS: Tensor | None) -> Tensor:
    """The teacher's states at the student's rows."""
    if positions_BS is None:
        return rows.pack(states_BUD)
    length = positions_BS.shape[1]
    of_teacher_N = positions_BS.flatten()[rows.positions]
    sequence_N = rows.positions // length
    return states_BUD.flatten(0, 1).index_select(0, sequence_N * states_BUD.shape[1] + of_teacher_N)
