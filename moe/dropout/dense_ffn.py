"""The dense feed-forward network of each layer: found, read and replaceable in any Transformers model."""

# D hidden (model) width, F FFN width

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..discovery import UnsupportedModelError
from ..weights import ExpertWeights
from .ffn_kinds import Candidate, candidates
from .ffn_reading import NotAnFFNError, read_candidate

SHARED = "its layers share one feed-forward network"

REFUSED = {"albert": SHARED}
"""Model types whose feed-forward networks can be found and not be replaced, with the reason."""


@dataclass(frozen=True, slots=True)
class DenseFFN:
    """One feed-forward network: ``down @ (act(gate @ x) * (up @ x))``, or ``down @ act(up @ x)``."""

    name: str
    """Module path where a replacement goes."""
    weights: ExpertWeights
    """Views of the model's parameters."""
    activation: nn.Module
    """Applied to the gate, or to `up` where there is none."""
    down_projection: nn.Module
    """The module that reads the F hidden activations."""
    dropout: nn.Module | None
    """What the FFN applied to its own output; ``None`` where that is nothing, or the layer does it."""
    emptied: tuple[str, ...] = ()
    """Paths of its parts outside `name`, which a replacement leaves without work."""

    @property
    def hidden_size(self) -> int:
        """D, the width of the input and the output."""
        return self.weights.hidden_size

    @property
    def width(self) -> int:
        """F, the number of neurons."""
        return self.weights.width

    def replace(self, model: PreTrainedModel, module: nn.Module) -> None:
        """Put `module` in the place of this FFN.

        Args:
            model: The model that the FFN was found in, or one of the same architecture.
            module: Takes ``[..., D]`` and returns ``[..., D]``.
        """
        model.set_submodule(self.name, module)
        for name in self.emptied:
            model.set_submodule(name, nn.Identity())


def dense_ffns(model: PreTrainedModel, layers: Sequence[int] | None = None) -> list[DenseFFN]:
    """Find the dense feed-forward networks of a model, in the order of its modules.

    Layers with routed experts are left out, `SMoEDropout` among them, and so are their shared experts.

    Args:
        model: Any Transformers model, on any device, the meta device included.
        layers: Which of them, counted from 0 over all feed-forward networks, dense or routed; all dense ones
            if ``None``. In a model of one kind of layers this is the number of the layer.

    Raises:
        ValueError: `layers` names one twice, or one that is not there.
        UnsupportedModelError: The model has no dense FFN, or one that is something else than the formulas
            above; says which and why.
    """
    class_name, model_type = type(model).__name__, getattr(model.config, "model_type", None)
    if model_type in REFUSED:
        raise UnsupportedModelError(f"{class_name} is not supported: {REFUSED[model_type]}")
    found = list(candidates(model))
    if not any(found):
        raise UnsupportedModelError(_nothing_found(model, has_experts=bool(found)))
    if len({id(c.down.weight) for c in found if c}) < sum(c is not None for c in found):
        raise UnsupportedModelError(f"{class_name} is not supported: {SHARED}")
    if layers is None:
        return [_read(model, candidate) for candidate in found if candidate is not None]
    wrong = [n for n in layers if not 0 <= n < len(found) or found[n] is None or list(layers).count(n) > 1]
    if wrong:
        dense = [n for n, candidate in enumerate(found) if candidate is not None]
        raise ValueError(
            f"layers={list(layers)}: {wrong} are twice in it or no layers of {class_name} with a dense "
            f"feed-forward network, which are {dense}"
        )
    return [_read(model, candidate) for n, candidate in enumerate(found) if candidate and n in layers]


def ffns_at(model: PreTrainedModel, names: Collection[str]) -> dict[str, DenseFFN]:
    """Find the dense feed-forward networks of those names, in the order of the model's modules.

    Others are not looked at, whatever they are. A head model's names are found in its base model, and the
    other way round.

    Returns:
        By the names as they were given.

    Raises:
        ValueError: There is none of that name.
        UnsupportedModelError: It is something else than an FFN.
    """
    places = {candidate.name: candidate for candidate in candidates(model) if candidate is not None}
    prefix = f"{model.base_model_prefix}."
    given: dict[str, str] = {}
    for name in names:
        spellings = (name, prefix + name, name.removeprefix(prefix))
        if (place := next((spelling for spelling in spellings if spelling in places), None)) is None:
            raise ValueError(f"{type(model).__name__} has no FFN {name!r}, only {sorted(places)}")
        given[place] = name
    return {given[place]: _read(model, found) for place, found in places.items() if place in given}


def _nothing_found(model: PreTrainedModel, has_experts: bool) -> str:
    """Why a model has no dense FFN."""
    class_name = type(model).__name__
    if has_experts:
        return (
            f"{class_name} has no dense feed-forward network, it is a Mixture-of-Experts model already: "
            "use moekit compress"
        )
    modules = dict(model.named_modules())
    layer = next((m[0] for m in modules.values() if isinstance(m, nn.ModuleList) and len(m)), model)
    parts = ", ".join(f"{name} ({type(part).__name__})" for name, part in layer.named_children())
    return (
        f"found no feed-forward network in {class_name}; moekit knows those of two or three linear layers "
        f"around an activation module, and its first layer, {type(layer).__name__}, has {parts or 'nothing'}"
    )


def _read(model: PreTrainedModel, candidate: Candidate) -> DenseFFN:
    try:
        reading = read_candidate(candidate)
    except NotAnFFNError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: '{candidate.path}' ({type(candidate.owner).__name__}) "
            f"looks like a feed-forward network, but {error} (`layers` can leave it out)"
        ) from error
    paths = {module: f"{candidate.path}.{name}" for name, module in candidate.owner.named_modules()}
    parts = [] if candidate.is_whole else [paths[part] for part in (reading.activation, candidate.down)]
    return DenseFFN(
        name=candidate.name,
        weights=reading.weights,
        activation=reading.activation,
        down_projection=candidate.down,
        dropout=reading.dropout,
        emptied=tuple(path for path in parts if not path.startswith(f"{candidate.name}.")),
    )
