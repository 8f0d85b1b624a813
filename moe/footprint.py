"""Where a model's parameters and bytes are, part by part, as its checkpoint stores them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .layer import ExpertLayer

PARTS = ("embeddings", "attention", "routers", "experts", "shared experts", "other")
"""In the order of reports; ``attention`` counts linear attention and state-space mixers in; ``other`` is
norms between layers, dense feed-forward layers and heads of its own."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Parameters and bytes of a model by part; a tensor that is tied counts once."""

    parameters: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total_parameters(self) -> int:
        """All parts."""
        return sum(self.parameters.values())

    @property
    def total_bytes(self) -> int:
        """All parts: what the tensors of the checkpoint take on disk, without the files' headers."""
        return sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"parameters": self.parameters, "bytes": self.bytes}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes: parameters and persistent buffers, tied ones once."""
    seen: set[tuple[Any, ...]] = set()
    stored = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        place = (
            (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.device.type != "meta" else (name,)
        )
        if name in tied or (place in seen and tensor.numel()):
            continue
        seen.add(place)
        stored[name] = tensor
    return stored


def footprint(model: nn.Module, layers: Iterable[ExpertLayer]) -> Footprint:
    """Sum parameters and bytes by part."""
    layers = list(layers)
    prefixes = {module: name for name, module in model.named_modules()}
    routers = tuple(prefixes[layer.router] + "." for layer in layers)
    experts = tuple(prefixes[layer.experts_module] + "." for layer in layers)
    blocks = tuple(layer.name + "." for layer in layers)
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    embeddings = tuple(prefixes[module] + "." for module in ends if module in prefixes)
    parameters: dict[str, int] = dict.fromkeys(PARTS, 0)
    sizes = parameters.copy()
    for name, tensor in stored_tensors(model).items():
        part = "embeddings" if name.startswith(embeddings) else _part(name, routers, experts, blocks)
        if tensor.is_floating_point():
            parameters[part] += tensor.numel()
        sizes[part] += tensor.numel() * tensor.element_size()
    return Footprint(parameters=parameters, bytes=sizes)


def _part(name: str, routers: tuple[str, ...], experts: tuple[str, ...], blocks: tuple[str, ...]) -> str:
    if name.startswith(routers):
        return "routers"
    if name.startswith(experts):
        return "experts"
    if name.startswith(blocks) and "shared" in name:
        return "shared experts"
    if "embed" in name:
        return "embeddings"
    steps = [step.lower() for step in name.split(".") if "norm" not in step]  # post_attention_layernorm
    if any("attn" in step or "attention" in step for step in steps):
        return "attention"
    if not name.startswith(blocks) and any("mixer" in step or "mamba" in step for step in steps):
        return "attention"
    return "other"


def expert_bytes(layer: ExpertLayer) -> int:
    """Bytes of one expert of a layer."""
    return sum(t.numel() * t.element_size() for _, t in layer.storage.read(0).named_tensors())
