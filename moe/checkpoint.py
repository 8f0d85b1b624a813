"""The two checkpoint forms: stock, and moekit through transformers' quantizer registry.

*stock* is the family's own class with fewer experts. *moekit* is exact: E router rows over M experts, with
another M in each layer. Its `config.json` says so in ``quantization_config``, and once this module is
imported, a plain ``AutoModelForCausalLM.from_pretrained`` rebuilds the layers before it loads the weights.

Without that import transformers 5.23 warns of an "unknown quantization type" and builds the layers as large
as the config counts; it then stops, because the weights have other shapes. Two cases load all the same and
are wrong, with no more than warnings: Switch, whose experts are separate modules (random ones stand in for
those that are not there), and a model of which no layer became smaller (experts in another order).
"""

# E logical experts, M physical experts

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_entry import check_entry
from .constants import check_constants, num_constants, set_constants
from .discovery import expert_layers, has_experts
from .dropout.build import DropoutSpec, install_layers, read_spec
from .group_router import set_logit_columns
from .layer import ExpertLayer
from .low_rank import LowRankStorage, check_rows, low_rank_entry, make_low_rank
from .redirect import has_constants
from .router import CONFIG_PARTS, EXPERT_COUNT_KEYS, set_config_count

METHOD = "moekit"
VERSION = 1
_IN_A_LAYER = re.compile(r"\.\d+\.")


class MoekitConfig(QuantizationConfigMixin):
    """How many experts each layer holds and how its router reaches them.

    Args:
        layers: By layer name: ``num_experts`` (M, physical), ``num_router_rows`` (E), and ``router``, one of
            ``full``, ``redirect``, ``logsumexp``; for the last also ``renormalises`` and ``scale``. For
            experts in factors also ``low_rank``: their ``rank``, and ``rows`` of S of both maps. Behind them
            there may be ``constants``, C experts that say the same to every token.
        smoe_dropout: The fields of `DropoutSpec`, for a dense model whose FFNs became SMoE-Dropout layers.
        version: Of this format.

    Raises:
        ValueError: The version is newer than this moekit, or an entry cannot be.
    """

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        smoe_dropout: dict[str, Any] | None = None,
        version: int = VERSION,
        **_: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(
                f"this checkpoint is of moekit format {version}; this moekit reads {VERSION}: update it"
            )
        self.quant_method: Any = METHOD
        self.version = version
        self.layers = layers or {}
        for name, entry in self.layers.items():
            check_entry(name, entry)
        self.smoe_dropout = smoe_dropout
        if smoe_dropout is not None:
            read_dropout_spec(smoe_dropout)


# Not as a decorator, which would hide the class's own type from type checkers.
register_quantization_config(METHOD)(MoekitConfig)


def read_dropout_spec(entry: Any) -> DropoutSpec:
    """Read the description of SMoE-Dropout layers; `ValueError` when it is none."""
    names = sorted(field.name for field in fields(DropoutSpec))
    if not isinstance(entry, dict) or sorted(entry) != names:
        raise ValueError(f"smoe_dropout={entry!r} does not have exactly the entries {', '.join(names)}")
    return DropoutSpec(**entry)


@register_quantizer(METHOD)
class MoekitQuantizer(HfQuantizer):
    """Rebuilds the layers of a moekit checkpoint before its weights are loaded. Nothing is quantised."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config: Any = self.quantization_config
        for layer in rebuild_layers(model, config):
            # Switch's initialisation would visit as many experts as the config counts; others look for the
            # matrices of low-rank experts.
            layer.block._is_hf_initialized = layer.experts_module._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        layers = {layer.name: layer for layer in expert_layers(model)}
        config: Any = self.quantization_config
        for name in layers if config.smoe_dropout is not None else config.layers:
            check_loaded(_find(layers, name, model))
        if config.smoe_dropout is not None:
            check_layers_loaded(model)
        level_router_logits(model, layers.values())
        # These are ordinary weights: `model.float()` and Jamba's mixers ask, and must not hear otherwise.
        quantised: Any = model
        quantised.is_quantized = False
        # With a quantizer, `save_pretrained(state_dict=...)` ignores what FSDP or ZeRO-3 has gathered for it.
        quantised.hf_quantizer = None
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> Any:
        """`save_pretrained` writes it as it is."""
        return True

    @property
    def is_trainable(self) -> Any:
        """All weights are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The map is one gather."""
        return True


def _find(layers: dict[str, ExpertLayer], name: str, model: PreTrainedModel) -> ExpertLayer:
    """The layer of that name, also when a base model is loaded from a head model's checkpoint."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in layers:
            return layers[candidate]
    raise ValueError(
        f"the checkpoint's config names layer {name!r}; {type(model).__name__} has {sorted(layers)}"
    )


def rebuild_layers(model: PreTrainedModel, config: MoekitConfig) -> list[ExpertLayer]:
    """Give a freshly built model the layers that its moekit config says, with contents yet to be loaded.

    Returns:
        The layers that were compressed, whether they were SMoE-Dropout layers before or the family's own.

    Raises:
        ValueError: The config names a layer that the model does not have, or does not fit it.
    """
    if config.smoe_dropout is not None:
        active = getattr(model.config, "num_experts_per_tok", None)
        install_layers(model, read_dropout_spec(config.smoe_dropout), active)
    if not config.layers:
        return []
    layers = {layer.name: layer for layer in expert_layers(model)}
    rebuilt = [_find(layers, name, model) for name in config.layers]
    for layer, entry in zip(rebuilt, config.layers.values(), strict=True):
        rebuild_layer(layer, entry)
    return rebuilt


def rebuild_layer(layer: ExpertLayer, entry: dict[str, Any]) -> None:
    """Give a freshly built layer the shapes that a config entry says, with contents yet to be loaded."""
    num_experts, rows = entry["num_experts"], entry["num_router_rows"]
    if rows > layer.num_experts:
        raise ValueError(
            f"layer {layer.name!r} is built with {layer.num_experts} experts; its entry needs {rows} rows"
        )
    if rows < layer.num_experts:
        layer.remove_experts(range(rows), check=False)
    layer.storage.allocate(num_experts)
    constants, width = entry.get("constants", 0), layer.hidden_size
    unknown = [min(e, num_experts + constants - 1) for e in range(rows)]
    if entry["router"] == "redirect":
        layer.set_expert_map(unknown)
    elif entry["router"] == "logsumexp":
        layer.set_expert_groups(unknown, renormalises=entry["renormalises"], scale=entry["scale"])
    if (factors := entry.get("low_rank")) is not None:
        first, second = factors["rows"]
        make_low_rank(layer.experts_module, factors["rank"], (first, second), layer=layer.name)
        layer.storage = LowRankStorage(layer.experts_module)
    if constants:
        check_constants(layer)
        set_constants(layer, torch.empty(constants, width, device=layer.device))


def check_loaded(layer: ExpertLayer) -> None:
    """Refuse a checkpoint that did not fill a layer; transformers only warns and draws random numbers.

    Raises:
        ValueError: A tensor of the experts or the router was not in the files, or a map points outside.
    """
    if is_deepspeed_zero3_enabled():
        return  # which has parts of the tensors on each process
    for part in (layer.experts_module, layer.router):
        for name, tensor in part.state_dict(keep_vars=True).items():
            if not getattr(tensor, "_is_hf_initialized", False) and tensor.device.type != "meta":
                raise ValueError(f"the checkpoint lacks {name!r} of layer {layer.name!r}; it is damaged")
    maps = (layer.expert_map, layer.router._buffers.get("expert_group"))
    for indices in (m for m in maps if m is not None and m.device.type != "meta"):
        used = sorted(set(indices.tolist()))
        last = layer.num_physical_experts + num_constants(layer) - 1
        if used != list(range(last + 1)):
            raise ValueError(
                f"the checkpoint maps the experts of layer {layer.name!r} to {used}, not "
                f"to each of 0..{last}; it is damaged"
            )
    check_rows(layer.experts_module, layer.name)


def check_layers_loaded(model: PreTrainedModel) -> None:
    """Refuse a checkpoint whose config leaves out layers that its files have, and the other way round.

    Raises:
        ValueError: A parameter of a numbered layer was not in the files; a new head's may be missing.
    """
    if is_deepspeed_zero3_enabled():
        return
    for name, parameter in model.named_parameters():
        loaded = getattr(parameter, "_is_hf_initialized", False) or parameter.device.type == "meta"
        if _IN_A_LAYER.search(name) and not loaded:
            raise ValueError(f"the checkpoint lacks {name!r}, which its config says is there; it is damaged")


def level_router_logits(model: PreTrainedModel, layers: Iterable[ExpertLayer]) -> None:
    """Let layers that lost different numbers of router rows show logits of one width.

    Transformers' load-balancing loss adds up the layers' probabilities and cannot take several widths.
    """
    columns = configured_experts(model.config)
    for layer in layers:
        is_cut = layer.router_mode == "full" and columns is not None and layer.num_experts < columns
        if is_cut and layer.router_constraints.returns_choices:
            set_logit_columns(layer.router, columns)
        else:
            set_logit_columns(layer.router, None)


def layer_entries(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Config entries of the layers that differ from what the model's own config builds."""
    entries = {}
    for layer in _layers_if_any(model):
        mode = layer.router_mode
        group_of = layer.router._buffers.get("expert_group")
        rows = layer.num_experts if group_of is None else len(group_of)
        factors = low_rank_entry(layer.experts_module)
        if mode == "full" and rows == configured_experts(model.config) and factors is None:
            continue
        entries[layer.name] = {
            "num_experts": layer.num_physical_experts,
            "num_router_rows": rows,
            "router": mode,
        }
        if has_constants(layer.experts_module):
            entries[layer.name]["constants"] = num_constants(layer)
        if factors is not None:
            entries[layer.name]["low_rank"] = factors
        if mode == "logsumexp":
            entries[layer.name] |= {
                "renormalises": layer.router.group_renormalises,
                "scale": layer.router.group_scale,
            }
    return entries


def _layers_if_any(model: PreTrainedModel) -> list[ExpertLayer]:
    """Those of `expert_layers`; none for a dense model, which a checkpoint holds as it is."""
    return expert_layers(model) if has_experts(model) else []


def configured_experts(config: Any) -> int | None:
    """The number of experts that the model's own config builds in every layer."""
    for part in (config, *(getattr(config, name, None) for name in CONFIG_PARTS)):
        for key in EXPERT_COUNT_KEYS:
            if type(value := getattr(part, key, None)) is int:
                return value
    return None


def update_expert_count(model: PreTrainedModel, old: int, new: int) -> None:
    """Count `new` experts in the config and wherever a head model keeps the number for its auxiliary loss."""
    set_config_count(model.config, old, new)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "num_experts", None) == old:
            counting: Any = module
            counting.num_experts = new


def mark_form(model: PreTrainedModel) -> str:
    """Write into the model's config which form it has to be saved in: ``moekit`` or ``stock``."""
    level_router_logits(model, _layers_if_any(model))
    marked: Any = model
    entries, spec = layer_entries(model), read_spec(model)
    if entries or spec is not None:
        dropout = None if spec is None else spec.to_dict()
        config: Any = MoekitConfig(layers=entries, smoe_dropout=dropout)
        marked.config.quantization_config = config
        return "moekit"
    if isinstance(getattr(marked.config, "quantization_config", None), MoekitConfig):
        del marked.config.quantization_config
    return "stock"


def save_checkpoint(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    max_shard_size: str = "5GB",
    state_dict: dict[str, Tensor] | None = None,
) -> str:
    """Save a model whose layers were replaced or cut, in the simplest form that holds it exactly.

    Args:
        model: The model in memory.
        folder: Where to; made if it is missing.
        max_shard_size: As in `save_pretrained`.
        state_dict: The model's, where its own is divided among processes.

    Returns:
        ``stock`` or ``moekit``.
    """
    form = mark_form(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=state_dict)
    write_config_aliases(Path(folder) / "config.json")
    return form


def write_config_aliases(path: Path) -> None:
    """Spell expert counts and rotary base in `config.json` as older readers look for them.

    Transformers 5 writes Qwen3-MoE's count as ``num_local_experts`` and the rotary base only inside
    ``rope_parameters``; version 4 and several engines then silently use their defaults, 128 and 10,000.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    _add_aliases(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_aliases(config: dict[str, Any]) -> None:
    count = next((config[key] for key in EXPERT_COUNT_KEYS if type(config.get(key)) is int), None)
    if count is not None:
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            config.setdefault(key, count)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    for part in config.values():
        if isinstance(part, dict) and part is not rope and "model_type" in part:
            _add_aliases(part)


@torch.no_grad()
def max_logit_difference(model: PreTrainedModel, other: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """Largest absolute difference of two models' logits on the same inputs, relative to the largest logit."""
    return logit_difference(model(**inputs).logits, other(**inputs).logits)


def logit_difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, relative to the largest logit of the first."""
    mine, theirs = mine.float(), theirs.float()
    return float((mine - theirs).abs().max() / mine.abs().max().clamp_min(1e-12))
