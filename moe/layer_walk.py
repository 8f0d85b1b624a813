"""The decoder layers of a model, run one at a time by the model's own forward.

Masks, positions and everything else that a layer is given are as always; what one layer gives is handed to
the next by the caller, who may keep it and change the layers between.
"""

# B batch, S sequence, D hidden width

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .discovery import expert_layers
from .layer import ExpertLayer

NUMBERED = re.compile(r"^(.*?)\.(\d+)(\.|$)")
"""List, index and rest of the name of a module in a list."""


class NotStreamableError(ValueError):
    """A model whose layers cannot be run one by one."""


class _ReachedError(Exception):
    """Leaves a forward once the wanted layer has run."""


class _EntangledError(Exception):
    """A layer was not handed what the one before it gave."""


class LayerWalk:
    """The list of a model's decoder layers, which can be run one by one.

    Attributes:
        model: The model.
        layers: Its decoder layers.
        path: Where they are in it, such as ``model.layers``.

    Args:
        model: With weights or without.

    Raises:
        NotStreamableError: The expert layers are not all in one list of decoder layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.path = _list_path(model)
        self.layers: Any = model.get_submodule(self.path)
        self._is_in_layer = False

    def __len__(self) -> int:
        return len(self.layers)

    def expert_layers(self, index: int) -> list[ExpertLayer]:
        """The expert layers within a decoder layer; the model has to be asked anew after each change."""
        prefix = f"{self.path}.{index}"
        return [
            layer
            for layer in expert_layers(self.model)
            if layer.name == prefix or layer.name.startswith(f"{prefix}.")
        ]

    @contextmanager
    def only(self, index: int, hidden: Callable[[], Tensor | None]) -> Iterator[list[Tensor]]:
        """Let forwards of the model run one decoder layer and end behind it.

        Args:
            index: Of the layer; those before it pass through what they get.
            hidden: Gives what the layer reads; ``None`` for what reaches it (the embeddings).

        Yields:
            What the layer gave, one tensor for each forward. Forwards end with an exception, which
            `run` catches.
        """
        given: list[Tensor] = []
        own = self.layers[index].forward

        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            reached = hidden()
            self._is_in_layer = True
            output = own(first if reached is None else reached, *args, **kwargs)
            self._is_in_layer = False
            given.append(output[0] if isinstance(output, tuple) else output)
            raise _ReachedError

        with ExitStack() as stack:
            for number in range(index):
                stack.enter_context(_with_forward(self.layers[number], lambda first, *_, **__: first))
            stack.enter_context(_with_forward(self.layers[index], run))
            yield given

    def run(self, inputs: Mapping[str, Any]) -> None:
        """A forward of the model within `only`.

        Raises:
            NotStreamableError: The model's layers do not run in order, or not without those before them.
        """
        self._is_in_layer = False
        try:
            self.model(**{**inputs, "use_cache": False})
        except _ReachedError:
            return
        # A model may do anything with what its layers did not give as they always do.
        except Exception as error:
            if self._is_in_layer:
                raise
            raise self._entangled() from error
        raise self._entangled()

    def check(self, inputs: Mapping[str, Any]) -> int:
        """Refuse a model whose layers pass on more than hidden states; no layer is run, or needs weights.

        The model's own forward runs with stand-ins for its layers, twice: each must be handed the very tensor
        that the one before gave, and beside it the same, whatever that tensor holds.

        Args:
            inputs: Arguments of the model, for one small batch.

        Returns:
            Bytes of the hidden states that a layer hands on for it.

        Raises:
            NotStreamableError: Names the family.
        """
        # Such layers read what others have put into a common table.
        if any(getattr(module, "is_kv_shared_layer", False) for module in self.layers.modules()):
            raise self._entangled()
        try:
            size, beside = self._handed(inputs, torch.clone)
            _, again = self._handed(inputs, torch.ones_like)
            equal = len(beside) == len(again) and all(map(torch.equal, beside, again))
        except Exception as error:  # as in `run`
            raise self._entangled() from error
        if not equal:
            raise self._entangled()
        return size

    @torch.no_grad()
    def _handed(
        self, inputs: Mapping[str, Any], give: Callable[[Tensor], Tensor]
    ) -> tuple[int, list[Tensor]]:
        """Bytes of hidden states, and what layers get beside them, where `give` makes what they give."""
        given: list[Tensor] = []
        beside: list[Tensor] = []

        def stand_in(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if given and first is not given[-1]:
                raise _EntangledError
            beside.extend(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            given.append(give(first))
            if len(given) == len(self):
                raise _ReachedError
            return given[-1]

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_with_forward(layer, stand_in))
            try:
                self.model(**{**inputs, "use_cache": False})
            except _ReachedError:
                return given[-1].nbytes, beside
        raise _EntangledError

    def _entangled(self) -> NotStreamableError:
        return NotStreamableError(
            f"{type(self.model).__name__} ({self.model.config.model_type}) cannot be run one decoder layer "
            "at a time: its layers pass on more than hidden states, so leave out --stream to compress it in "
            "memory"
        )

    def logits(self, inputs: Mapping[str, Any], hidden_BSD: Tensor) -> Tensor:
        """What the model says when its last decoder layer gives these hidden states.

        Args:
            inputs: Arguments of the model.
            hidden_BSD: On any device.

        Returns:
            Logits ``[B, S, V]``.
        """
        given = hidden_BSD.to(self.model.device)
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_with_forward(layer, lambda *_, **__: given))
            return self.model(**{**inputs, "use_cache": False}).logits

    def step(self, index: int, inputs: Sequence[Mapping[str, Any]], hidden: list[Tensor]) -> list[Tensor]:
        """Run one decoder layer on all batches.

        Args:
            index: Of the layer.
            inputs: Arguments of the model, for each batch.
            hidden: What the layer reads of each; not looked at for the first layer.

        Returns:
            What it gives, on the CPU.
        """
        reads: Iterator[Tensor | None] = iter(hidden if index else [None] * len(inputs))

        def reading() -> Tensor | None:
            reached = next(reads)
            return None if reached is None else reached.to(self.model.device)

        with self.only(index, reading) as given:
            for batch in inputs:
                self.run(batch)
                given[-1] = given[-1].cpu()
        return given

    @torch.no_grad()
    def is_faithful(self, inputs: Mapping[str, Any]) -> bool:
        """Whether layers run one by one give what the model's own forward gives, tried on a batch."""
        outputs: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handle = self.layers[-1].register_forward_hook(keep)
        try:
            self.model(**{**inputs, "use_cache": False})
        finally:
            handle.remove()
        hidden: list[Tensor] = []
        try:
            for index in range(len(self)):
                hidden = self.step(index, [inputs], hidden)
        # A model may do anything with what its layers did not give as they always do.
        except Exception:
            return False
        return len(outputs) == 1 and torch.equal(outputs[0].cpu(), hidden[0])


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _list_path(model: PreTrainedModel) -> str:
    paths = {found[1] for layer in expert_layers(model) if (found := NUMBERED.match(layer.name))}
    if len(paths) != 1 or not isinstance(model.get_submodule(min(paths, default="")), nn.ModuleList):
        raise NotStreamableError(
            f"the expert layers of {type(model).__name__} are not in one list of decoder layers "
            f"({', '.join(sorted(paths)) or 'none'}); leave out --stream to compress it in memory"
        )
    return paths.pop()
