"""Let the text reach one layer of a model after another, each behind what has become of those before it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..moe.evaluating import evaluating
from ..moe.layer import ExpertLayer
from ..moe.layer_walk import LayerWalk, NotStreamableError

Inputs = Sequence[Mapping[str, Any]]
"""Arguments of the model, for each batch."""


@runtime_checkable
class LayerReader(Protocol):
    """Runs the text up to a layer; layers come in the order of the forward, and may be changed between."""

    def read(self, layer: ExpertLayer) -> None:
        """Let a layer read the text once."""
        ...


def layer_reader(model: PreTrainedModel, inputs: Inputs) -> LayerReader:
    """The fast way where that gives what the model's own forward gives, tried on a sequence; or the slow."""
    first = {name: part[:1] if isinstance(part, Tensor) else part for name, part in inputs[0].items()}
    try:
        walk = LayerWalk(model)
    except NotStreamableError:
        return _FromStart(model, inputs)
    with evaluating(model):
        is_faithful = walk.is_faithful(first)
    return _FromLayerBefore(walk, inputs) if is_faithful else _FromStart(model, inputs)


class _FromLayerBefore:
    """Keeps what the layer before has given."""

    def __init__(self, walk: LayerWalk, inputs: Inputs) -> None:
        self.walk, self.inputs = walk, inputs
        self.index = 0
        self.hidden: list[Tensor] = []

    @torch.no_grad()
    def read(self, layer: ExpertLayer) -> None:
        """Run the decoder layers from the last one read on, changed as they are by now."""
        wanted = int(layer.name.removeprefix(f"{self.walk.path}.").partition(".")[0])
        while self.index < wanted:
            self.hidden = self.walk.step(self.index, self.inputs, self.hidden)
            self.index += 1
        self.walk.step(self.index, self.inputs, self.hidden)


class _ReachedError(Exception):
    """Leaves a forward behind the layer that is read."""


class _FromStart:
    """Runs the model up to the layer."""

    def __init__(self, model: PreTrainedModel, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    @torch.no_grad()
    def read(self, layer: ExpertLayer) -> None:
        """Run all that comes before it once more."""

        def stop(*_: Any) -> None:
            raise _ReachedError

        handle = layer.block.register_forward_hook(stop)
        try:
            for batch in self.inputs:
                try:
                    self.model(**batch)
                except _ReachedError:
                    continue
        finally:
            handle.remove()
