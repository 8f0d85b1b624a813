"""How evenly a model's experts are used, as a loss, whatever family it is of."""

# T tokens, E experts, K active experts, B batch, S sequence

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from .dropout.balance import load_balance_loss
from .layer import ExpertLayer


@contextmanager
def collect_expert_load(
    layers: Sequence[ExpertLayer], attention_mask: Shaped[Tensor, "B S"] | None
) -> Iterator[Callable[[], Float[Tensor, ""]]]:
    """Listen to the routers of a model.

    Args:
        layers: Its expert layers.
        attention_mask: 0 for padding, whose tokens do not count.

    Yields:
        A function that gives the mean over layers of `load_balance_loss`; to be called after the forward.
    """
    shown: dict[str, Tensor] = {}
    chosen: dict[str, Tensor] = {}
    counted_T = None if attention_mask is None else attention_mask.flatten() != 0

    def note_logits(layer: ExpertLayer, module: Any, args: Any, output: Any) -> None:
        # Not yet as logits: nothing may be computed here that gradient checkpointing will not repeat.
        shown[layer.name] = output if isinstance(output, Tensor) else output[layer.logits_index or 0]

    def note_choice(name: str, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        chosen[name] = ids_TK

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.router.register_forward_hook(partial(note_logits, layer), prepend=True)
            stack.callback(handle.remove)
            stack.enter_context(layer.observe(partial(note_choice, layer.name)))

        def load() -> Tensor:
            terms = [
                load_balance_loss(
                    layer.as_logits(shown[layer.name].flatten(0, -2)), chosen[layer.name], counted_T
                )
                for layer in layers
                if layer.name in chosen
            ]
            return torch.stack(terms).mean()

        yield load
