"""What the routers of SMoE-Dropout layers read and return while the model runs, and which tokens count."""

# T tokens, D hidden (model) width, E experts, K active experts

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masks import AttentionMasks, LayerMasks
from .convert import require_smoe_layers


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """One call of one layer's router."""

    layer: str
    """Name of the layer."""
    router: nn.Module
    hidden_states: Tensor
    """``[T, D]``, what it read."""
    router_logits: Tensor
    """``[T, E]``."""
    expert_ids: Tensor
    """``[T, K]``, what it chose."""
    counted: Tensor | None
    """``[T]``, which tokens are no padding; ``None`` when all count."""


@contextmanager
def observe_routers(model: PreTrainedModel, on_routed: Callable[[RoutedTokens], None]) -> Iterator[None]:
    """Call `on_routed` after every router has run, but not for the repeats of gradient checkpointing.

    Raises:
        UnsupportedModelError: The model has no SMoE-Dropout layers.
        ValueError: While it runs: the attention mask does not say which tokens are padding.
    """
    layers = require_smoe_layers(model)
    masks = AttentionMasks(model)
    with ExitStack() as stack:
        stack.enter_context(masks.watch())
        for name, layer in layers.items():
            hook = _router_hook(name, masks.around_module(layer, name), on_routed)
            stack.callback(layer.router.register_forward_hook(hook).remove)
        yield


def _router_hook(
    name: str, masks: LayerMasks, on_routed: Callable[[RoutedTokens], None]
) -> Callable[..., None]:
    def hook(router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        if masks.is_running:
            logits_TE, _, ids_TK = output
            counted_T = masks.of(len(ids_TK))
            counted_T = None if counted_T is None else counted_T.to(ids_TK.device)
            on_routed(RoutedTokens(name, router, args[0], logits_TE, ids_TK, counted_T))

    return hook
