"""Find every Mixture-of-Experts layer of a Transformers model."""

from inspect import signature
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .dropout.layer import SMoEDropout
from .families import JetMoeLayer, Llama4Layer, SwitchLayer
from .layer import ExpertLayer
from .storage import ExpertStorage, ModuleStorage, ParallelLinearStorage, find_storage

REFUSED = {
    "diffusion_gemma": "its encoder and its decoder share the very same experts but not their routing",
    "ernie4_5_vl_moe": "its checkpoints keep the text and the vision experts of a layer in one list, which "
    "cannot hold another number of the one than of the other",
    "nllb-moe": "in transformers 5.23 its forward runs only experts 0 and 1 (the router's one-hot mask is "
    "one-hot encoded again), so any figure of its experts would be wrong",
    "doge": "its experts are single rows of an embedding, chosen by product keys; there is nothing to merge",
    "vitpose_backbone": "its experts are chosen by data set, not by a router",
}
"""Model types that have something called experts and cannot be served, with the reason."""


class UnsupportedModelError(ValueError):
    """The model has no MoE layer that moekit can serve."""


def has_experts(model: PreTrainedModel) -> bool:
    """Whether any module holds routed experts that `expert_layers` would find."""
    return any(find_storage(module) is not None for module in model.modules())


def expert_layers(model: PreTrainedModel) -> list[ExpertLayer]:
    """Find the MoE layers of a model, in the order of its modules.

    Shared experts, dense layers and attention experts are left alone.

    Raises:
        UnsupportedModelError: The model is dense, or of a family that cannot be served; says which and why.
    """
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if model_type in REFUSED:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {REFUSED[model_type]}")
    recorded = _recorded_routers(model)
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        storage = find_storage(module)
        if storage is None:
            continue
        block_name = name if isinstance(storage, ParallelLinearStorage) else name.rpartition(".")[0]
        block = modules[block_name]
        config = getattr(module, "config", None) or getattr(block, "config", None) or model.config
        layers.append(_make_layer(block_name, block, module, storage, recorded, config))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts: it is a dense model, or keeps its experts in a "
            "way that moekit does not know (docs/families.md lists the families and how to add one)"
        )
    return layers


def _recorded_routers(model: PreTrainedModel) -> dict[type[nn.Module], int]:
    """Router classes that the model's classes record, with the place of the logits in their output."""
    found: dict[type[nn.Module], int] = {}
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None) or {}
        entries = recorders.get("router_logits", [])
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            if isinstance(entry, OutputRecorder) and entry.target_class is not None:
                found[entry.target_class] = entry.index
    return found


def _find_router(
    block: nn.Module, experts: nn.Module, recorded: dict[type[nn.Module], int], num_experts: int
):
    """The router of a block, and where its logits are: as recorded, else whichever child has E rows."""
    if isinstance(block, SMoEDropout):
        return block.router, 0
    for child in block.children():
        if type(child) in recorded:
            return child, recorded[type(child)]
    for child in block.children():
        rows = [p.shape[0] for p in child.parameters() if p.ndim == 2]
        if child is not experts and any(num_experts <= r <= num_experts + 8 for r in rows):
            return child, 0
    raise UnsupportedModelError(
        f"found {num_experts} experts in {type(experts).__name__} but no router among the children of "
        f"{type(block).__name__}: {[n for n, _ in block.named_children()]}"
    )


def _make_layer(
    name: str,
    block: nn.Module,
    experts: nn.Module,
    storage: ExpertStorage,
    recorded: dict[type[nn.Module], int],
    config: Any,
) -> ExpertLayer:
    """Choose the class that fits how this block calls its experts."""
    expert_map = experts._buffers.get("expert_map")
    num_experts = len(storage) if expert_map is None else len(expert_map)
    router, index = _find_router(block, experts, recorded, num_experts)
    kind = ExpertLayer
    if isinstance(storage, ParallelLinearStorage):
        kind, index = JetMoeLayer, 4
    elif isinstance(storage, ModuleStorage):
        kind = SwitchLayer
    elif len(signature(type(experts).forward).parameters) == 2:  # (self, hidden_states)
        kind = Llama4Layer
    return kind(
        name=name,
        block=block,
        experts_module=experts,
        router=router,
        storage=storage,
        config=config,
        logits_index=index,
    )
