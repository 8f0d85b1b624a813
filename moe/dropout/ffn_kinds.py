"""Where the dense feed-forward networks of a Transformers model may be, by the shapes of its modules alone.

An FFN is a module of its own (Llama, GPT-2, ViT), two linear layers straight in the model's layer (OPT), or
the modules ``intermediate`` and ``output`` (BERT). What is found is a candidate: `ffn_reading` runs it to see
whether it is an FFN indeed.
"""

# D hidden (model) width, F FFN width

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..storage import find_storage

# Three square projections look like a gated FFN, and some norms are gated by a small FFN of their own.
_UNLIKELY = re.compile("att|norm")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What looks like an FFN."""

    name: str
    """Module path where a replacement goes."""
    owner: nn.Module
    """What holds all of its parts."""
    path: str
    """Module path of `owner`."""
    run: Callable[[Tensor], object]
    """Calls the FFN, or a part of the model that contains it, on hidden states ``[B, S, D]``."""
    inputs: tuple[nn.Module, ...]
    """One or two projections that widen."""
    down: nn.Module
    """The projection that narrows."""

    @property
    def is_whole(self) -> bool:
        """Whether the FFN is a module of its own, all of which is replaced."""
        return self.name == self.path


def candidates(model: PreTrainedModel) -> Iterator[Candidate | None]:
    """Yield the places of feed-forward networks in the order of the modules; ``None`` for routed experts.

    Only what is in a layer counts, which is an entry of a module list.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    layers = {name: _layer_of(name, modules) for name in modules}
    routed = {
        layers[name]
        for name, module in modules.items()
        if find_storage(module) is not None or "expert" in name.rpartition(".")[2]
    } - {None}
    for layer in dict.fromkeys(name for name in layers.values() if name is not None):
        if layer in routed:
            yield None
        elif not any(layer.startswith(f"{name}.") for name in routed):
            inside = [name for name in modules if layers[name] == layer]
            likely = [
                name
                for name in inside
                if not _UNLIKELY.search(name[len(layer) :]) and not isinstance(modules[name], nn.ModuleList)
            ]
            found = [c for name in likely for c in _in_modules(name, modules[name])]
            yield from found or _in_layer(layer, modules[layer])


def projection_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as a view ``[out, in]``, however it is stored."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _layer_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The innermost entry of a module list that `name` is in, or is."""
    while name:
        parent = name.rpartition(".")[0]
        if isinstance(modules[parent], nn.ModuleList):
            return name
        name = parent
    return None


def _is_projection(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear | Conv1D)
        and module.weight.ndim == 2
        and module.weight.is_floating_point()  # packed weights of a quantised model are not
    )


def _projections(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if _is_projection(child)]


def is_activation(module: nn.Module) -> bool:
    """Whether this may be an activation function: nothing inside, at most single numbers to learn (xIELU)."""
    return (
        not isinstance(module, nn.Dropout | nn.Identity)
        and not list(module.children())
        and all(p.numel() == 1 for p in module.parameters())
    )


def _split(projections: list[nn.Module]) -> tuple[tuple[nn.Module, ...], nn.Module] | None:
    """Tell the projection that narrows from the one or two before it; ``None`` if the shapes do not fit."""
    if len(projections) not in (2, 3):
        return None
    for down in reversed(projections):
        hidden, width = projection_weight(down).shape
        inputs = tuple(p for p in projections if p is not down)
        shapes = {tuple(projection_weight(p).shape) for p in inputs}
        if shapes == {(width, hidden)} or (len(inputs) == 1 and shapes == {(2 * width, hidden)}):
            return inputs, down
    return None


def _in_modules(name: str, module: nn.Module) -> Iterator[Candidate]:
    """An FFN that is `module`, or that its children ``intermediate`` and ``output`` are."""
    others = [child for child in module.children() if not _is_projection(child)]
    parts = _split(_projections(module))
    # A child of another kind that has weights makes it more than an FFN.
    if parts and all(is_activation(child) or isinstance(child, nn.Dropout | nn.Identity) for child in others):
        yield Candidate(name, module, name, module, *parts)
    intermediate, output = getattr(module, "intermediate", None), getattr(module, "output", None)
    if isinstance(intermediate, nn.Module) and isinstance(output, nn.Module):
        first, second = _projections(intermediate), _projections(output)
        parts = _split(first + second)
        if parts and len(first) == len(second) == 1:

            def run(hidden: Tensor) -> None:
                _call(output, intermediate(hidden), hidden)

            yield Candidate(f"{name}.intermediate", module, name, run, *parts)


def _in_layer(name: str, layer: nn.Module) -> Iterator[Candidate]:
    """An FFN whose parts are children of the layer, next to its attention."""
    parts = _split(_projections(layer))
    if parts and len(parts[0]) == 1 and any(is_activation(c) for c in layer.children()):
        children = dict(layer.named_children())
        first = next(n for n, child in children.items() if child is parts[0][0])

        def run(hidden: Tensor) -> None:
            _call(layer, hidden, None)

        yield Candidate(f"{name}.{first}", layer, name, run, *parts)


def _call(module: nn.Module, hidden: Tensor, rest: Tensor | None) -> None:
    """Call `module` on `hidden`, giving `rest` for every other argument that it requires."""
    parameters = list(signature(module.forward).parameters.values())[1:]
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in kinds and p.default is Parameter.empty]
    module(hidden, *[rest for _ in required])
