"""Language models without their logits: the hidden states that the head reads, and what becomes of them."""

# B batch, S sequence, D hidden width, V vocabulary

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..moe.evaluating import evaluating
from .fused import Head
from .task_head import TaskHead, UnsupportedStudentError, task_head

PROBE_TOKENS = 8
RELATIVE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of logits that were computed in another order; `COARSE` for lower precisions."""
COARSE = 3e-2


class NonFiniteLogitsError(ValueError):
    """A model says NaN or infinity."""


@dataclass(frozen=True, slots=True)
class LogitScale:
    """What a model does to ``W h + b``: ``c tanh(a (W h + b) / c)``."""

    scale: float
    """a, such as Cohere's ``logit_scale``."""
    softcap: float | None
    """c, such as Gemma 2's ``final_logit_softcapping``."""

    def head(self, linear: nn.Linear, num_columns: int | None = None) -> Head:
        """A linear map with it."""
        return Head.of(linear, softcap=self.softcap, scale=self.scale, num_columns=num_columns)


def logit_scale(model: PreTrainedModel) -> LogitScale:
    """Find what a language model does to the output of its head, by running a few tokens through it.

    Raises:
        NonFiniteLogitsError: It says NaN or infinity, so there is nothing to find.
        UnsupportedStudentError: Something else than a factor and a softcap.
    """
    head = task_head(model)
    raw: list[Tensor] = []
    handle = head.linear.register_forward_hook(lambda module, args, output: raw.append(output.detach()))
    ids_BS = torch.arange(PROBE_TOKENS, device=model.device)[None] % head.num_classes
    try:
        with evaluating(model):
            logits = model(input_ids=ids_BS).logits.double()
    finally:
        handle.remove()
    if len(raw) != 1 or raw[0].shape != logits.shape:
        raise UnsupportedStudentError(
            f"{type(model).__name__} does not make its logits of one call of its head"
        )
    product = raw[0].double()
    if not (torch.isfinite(product).all() and torch.isfinite(logits).all()):
        raise NonFiniteLogitsError(
            f"{type(model).__name__} says NaN or infinity in {raw[0].dtype}; load it in another dtype, or "
            "take another checkpoint"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    uncapped = logits
    if softcap is not None:
        uncapped = (logits / softcap).clamp(-1 + 1e-12, 1 - 1e-12).atanh() * softcap
    scale = float((uncapped * product).sum() / (product * product).sum())
    scale = 1.0 if abs(scale - 1) < RELATIVE_ERROR.get(raw[0].dtype, COARSE) else scale
    rebuilt = product * scale if softcap is None else (product * scale / softcap).tanh() * softcap
    error = (rebuilt - logits).abs().max() / logits.abs().max()
    if not error < RELATIVE_ERROR.get(raw[0].dtype, COARSE):
        raise UnsupportedStudentError(
            f"the logits of {type(model).__name__} are not its head's output with a factor and a softcap "
            f"(relative error {error:.2g})"
        )
    return LogitScale(scale, softcap)


@contextmanager
def reading_head(head: TaskHead) -> Iterator[list[Float[Tensor, "B S D"]]]:
    """Let the head note what it reads and multiply nothing; the model's logits are one meaningless column.

    Yields:
        What was read, filled as the model runs.
    """
    heard: list[Tensor] = []

    def forward(hidden_BSD: Tensor) -> Tensor:
        heard.append(hidden_BSD)
        return hidden_BSD[..., :1]

    linear: Any = head.linear
    own_forward = vars(linear).get("forward")
    linear.forward = forward
    try:
        yield heard
    finally:
        if own_forward is None:
            del linear.forward
        else:
            linear.forward = own_forward


def hidden_states(model: PreTrainedModel, head: TaskHead, inputs: dict[str, Any]) -> Float[Tensor, "B S D"]:
    """Run a language model up to its head.

    Raises:
        UnsupportedStudentError: It did not call its head once.
    """
    with reading_head(head) as heard:
        model(**inputs)
    if len(heard) != 1:
        raise UnsupportedStudentError(f"{type(model).__name__} called its head {len(heard)} times, not once")
    return heard[0]
