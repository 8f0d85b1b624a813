"""A key-value cache that grows without being copied at each token.

The dynamic cache of `transformers` concatenates: every token copies every layer's keys and values, which on a
CPU is a large part of decoding a small model. Here they lie in tensors with free columns behind them.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Free columns of a new tensor: at least this many, or half of what it holds.
MIN_FREE_COLUMNS = 64


class GrowingTensor:
    """A tensor ``[B, heads, length, dim]`` with free columns behind it."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.end = 0

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """`held`, then `new`, along the length.

        Nothing but `new` is copied if `held` is what this returned last, or the end of it; any other tensor
        (the first one, or one whose rows were selected) moves into a new buffer.
        """
        columns = new.shape[-2]
        num_held = held.shape[-2] if held.ndim == new.ndim else 0
        if not self._has_room(held, num_held, columns):
            free = max(MIN_FREE_COLUMNS, (num_held + columns) // 2)
            self.buffer = new.new_empty((*new.shape[:-2], num_held + columns + free, new.shape[-1]))
            self.end = num_held
            if num_held:
                self.buffer[..., :num_held, :] = held
        buffer: Any = self.buffer
        start, self.end = self.end, self.end + columns
        buffer[..., start : self.end, :] = new
        return buffer[..., start - num_held : self.end, :]

    def _has_room(self, held: Tensor, num_held: int, columns: int) -> bool:
        if self.buffer is None or self.end + columns > self.buffer.shape[-2]:
            return False
        # Memory of a living buffer is in no other tensor, so the address tells.
        skipped = (self.end - num_held) * self.buffer.shape[-1] * self.buffer.element_size()
        return held.data_ptr() == self.buffer.data_ptr() + skipped and len(held) == len(self.buffer)


class GrowingLayer(DynamicLayer):
    """One layer's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.growing_keys, self.growing_values = GrowingTensor(), GrowingTensor()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return everything."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        self.keys = self.growing_keys.append(keys, key_states)
        self.values = self.growing_values.append(values, value_states)
        return self.keys, self.values


class GrowingSlidingLayer(DynamicSlidingWindowLayer):
    """One layer's keys and values, of which only those in the window are kept."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.growing_keys, self.growing_values = GrowingTensor(), GrowingTensor()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return the window and what was appended."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys: Any = self.keys
        values: Any = self.values
        all_keys = self.growing_keys.append(keys, key_states)
        all_values = self.growing_values.append(values, value_states)
        self.keys = all_keys[:, :, 1 - self.sliding_window :]
        self.values = all_values[:, :, 1 - self.sliding_window :]
        return all_keys, all_values


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model; layers that are neither full nor sliding attention stay as they are."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
            cache.layers[index] = GrowingSlidingLayer(layer.sliding_window)
    return cache
