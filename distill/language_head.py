"""Language models without their logits, as distillation knows them: by their task head."""

# B batch, S sequence, D hidden width

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..moe import language_head
from ..moe.language_head import LogitScale, NonFiniteLogitsError, UnreadableHeadError
from .fused import Head
from .task_head import TaskHead, UnsupportedStudentError, task_head

__all__ = ["LogitScale", "NonFiniteLogitsError", "hidden_states", "logit_scale", "scaled_head"]


def scaled_head(scale: LogitScale, linear: nn.Linear, num_columns: int | None = None) -> Head:
    """A linear map, and what becomes of its output."""
    return Head.of(linear, softcap=scale.softcap, scale=scale.scale, num_columns=num_columns)


def logit_scale(model: PreTrainedModel) -> LogitScale:
    """Find what a language model does to the output of its head, by running a few tokens through it.

    Raises:
        NonFiniteLogitsError: It says NaN or infinity, so there is nothing to find.
        UnsupportedStudentError: Something else than a factor and a softcap.
    """
    with _unsupported():
        return language_head.logit_scale(model, task_head(model).linear)


def hidden_states(model: PreTrainedModel, head: TaskHead, inputs: dict[str, Any]) -> Float[Tensor, "B S D"]:
    """Run a language model up to its head.

    Raises:
        UnsupportedStudentError: It did not call its head once.
    """
    with _unsupported():
        return language_head.hidden_states(model, head.linear, inputs)


@contextmanager
def _unsupported() -> Iterator[None]:
    try:
        yield
    except UnreadableHeadError as error:
        raise UnsupportedStudentError(str(error)) from error
