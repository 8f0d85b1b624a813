"""Language models without their logits: what their head reads, and what becomes of its output."""

# B batch, S sequence, D hidden width, V vocabulary

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .evaluating import evaluating

PROBE_TOKENS = 8
RELATIVE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of logits that were computed in another order; `COARSE` for lower precisions."""
COARSE = 3e-2


class UnreadableHeadError(ValueError):
    """A language model whose logits are not its head's output with a factor and a softcap."""


class NonFiniteLogitsError(ValueError):
    """A model says NaN or infinity."""


@dataclass(frozen=True, slots=True)
class LogitScale:
    """What a model does to ``z = W h + b``: ``c tanh(a z / c)``."""

    scale: float = 1.0
    """a, such as Cohere's ``logit_scale``."""
    softcap: float | None = None
    """c, such as Gemma 2's ``final_logit_softcapping``."""

    def __call__(self, product: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """Logits of the head's output."""
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap


def logit_scale(model: PreTrainedModel, head: nn.Module | None = None) -> LogitScale:
    """Find what a language model does to the output of its head, by running a few tokens through it.

    Args:
        model: A causal language model.
        head: Its output embeddings by default.

    Raises:
        NonFiniteLogitsError: It says NaN or infinity, so there is nothing to find.
        UnreadableHeadError: Something else than a factor and a softcap.
    """
    head = model.get_output_embeddings() if head is None else head
    if head is None:
        raise UnreadableHeadError(f"{type(model).__name__} has no language-model head")
    raw: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: raw.append(output.detach()))
    ids_BS = torch.arange(PROBE_TOKENS, device=model.device)[None] % _vocabulary(model)
    try:
        with evaluating(model):
            logits = model(input_ids=ids_BS).logits.double()
    finally:
        handle.remove()
    name = type(model).__name__
    if len(raw) != 1 or raw[0].shape != logits.shape:
        raise UnreadableHeadError(f"{name} does not make its logits of one call of its head")
    product, tolerance = raw[0].double(), RELATIVE_ERROR.get(raw[0].dtype, COARSE)
    if not (product.isfinite().all() and logits.isfinite().all()):
        raise NonFiniteLogitsError(
            f"{name} says NaN or infinity in {raw[0].dtype}; load it in another dtype, or take another "
            "checkpoint"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    uncapped = logits
    if softcap is not None:
        uncapped = (logits / softcap).clamp(-1 + 1e-12, 1 - 1e-12).atanh() * softcap
    scale = float((uncapped * product).sum() / (product * product).sum())
    found = LogitScale(1.0 if abs(scale - 1) < tolerance else scale, softcap)
    error = (found(product) - logits).abs().max() / logits.abs().max()
    if not error < tolerance:
        raise UnreadableHeadError(
            f"the logits of {name} are not its head's output with a factor and a softcap "
            f"(relative error {error:.2g})"
        )
    return found


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


@contextmanager
def reading_head(head: nn.Module) -> Iterator[list[Float[Tensor, "B S D"]]]:
    """Let a head note what it reads and multiply nothing; the model's logits are one meaningless column.

    Yields:
        What was read, filled as the model runs.
    """
    heard: list[Tensor] = []

    def forward(hidden_BSD: Tensor) -> Tensor:
        heard.append(hidden_BSD)
        return hidden_BSD[..., :1].clone()  # not a view, which FSDP2 warns of

    module: Any = head
    own_forward = vars(module).get("forward")
    module.forward = forward
    try:
        yield heard
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward


def hidden_states(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, "B S D"]:
    """Run a language model up to its head.

    Raises:
        UnreadableHeadError: It did not call its head once.
    """
    with reading_head(head) as heard:
        model(**inputs)
    if len(heard) != 1:
        raise UnreadableHeadError(f"{type(model).__name__} called its head {len(heard)} times, not once")
    return heard[0]
