"""Which tokens count: the attention masks of the forwards that are running, seen from an MoE layer."""

# T tokens

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .layer import ExpertLayer


class AttentionMasks:
    """The attention masks of the running forwards: which of a layer's tokens count.

    Every Transformers model on the way to a layer is watched. The innermost knows best: a decoder behind an
    encoder is called with its own mask, under the same name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.models = [m for m in model.modules() if m is model or isinstance(m, PreTrainedModel)]
        self.running: dict[nn.Module, Any] = {}
        # Behind an encoder the outer model's `attention_mask` is that of the encoder.
        self.ask_outer_models = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep track of the masks inside the context."""

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature(module.forward).bind_partial(*args, **kwargs).arguments
            self.running[module] = (bound | bound.get("kwargs", {})).get("attention_mask")

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.running.pop(module, None)

        with ExitStack() as stack:
            for model in self.models:
                handle = model.register_forward_pre_hook(start, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(model.register_forward_hook(stop, always_call=True).remove)
            yield

    def around(self, layer: ExpertLayer) -> "LayerMasks":
        """The masks as they concern one layer."""
        return self.around_module(layer.block, layer.name)

    def around_module(self, module: nn.Module, name: str) -> "LayerMasks":
        """The masks as they concern one module, which errors call `name`."""
        models = [m for m in reversed(self.models) if any(module is part for part in m.modules())]
        return LayerMasks(self, name, models)


class LayerMasks:
    """Which of one layer's tokens count.

    Attributes:
        models: The models that the layer is part of, innermost first.
    """

    def __init__(self, masks: AttentionMasks, name: str, models: list[nn.Module]) -> None:
        self.masks = masks
        self.name = name
        self.models = models

    @property
    def is_running(self) -> bool:
        """False while gradient checkpointing repeats a forward, whose tokens have been counted."""
        return any(model in self.masks.running for model in self.models)

    def of(self, num_tokens: int) -> Tensor | None:
        """``[T]`` bool, or ``None`` when every token counts.

        Raises:
            ValueError: The mask does not say which of the layer's tokens are padding.
        """
        running = self.masks.running
        masks = [running[m] for m in self.models if m in running]
        masks = [mask for mask in (masks if self.masks.ask_outer_models else masks[:1]) if mask is not None]
        readable = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
        if not masks:
            return None
        if not readable:
            raise ValueError(
                f"layer {self.name!r}: recording needs the attention mask as [batch, length], to leave "
                "padding out; a prepared 4-D mask does not say it (in generate: use the dynamic cache)"
            )
        # With a key-value cache the mask also covers the past; only the last columns are being computed.
        mask = readable[0]
        columns, rest = divmod(num_tokens, mask.shape[0])
        if rest or columns > mask.shape[1]:
            raise ValueError(
                f"layer {self.name!r} got {num_tokens} tokens, which an attention mask of shape "
                f"{tuple(mask.shape)} does not cover"
            )
        return mask[:, mask.shape[1] - columns :].flatten().bool()
