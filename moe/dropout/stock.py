"""An SMoE-Dropout model as a stock Mixture-of-Experts class of Transformers, for any engine: `to_stock`."""

# E experts, I expert width, D hidden (model) width, K active experts

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ..discovery import UnsupportedModelError, expert_layers
from ..router import EXPERT_COUNT_KEYS
from .convert import require_smoe_layers
from .layer import SMoEDropout
from .router import SMoERouter

logger = logging.getLogger(__name__)

SHRINK = 2.0**-8
"""Of the rows of a router that stands for equal weights; a power of two keeps the order of the logits."""

NOT_COPIED = frozenset(
    {"architectures", "auto_map", "intermediate_size", "model_type", "transformers_version"}
    | {"num_experts_per_tok", "quantization_config", *EXPERT_COUNT_KEYS}
)
"""Entries of the dense config that say what the new one says otherwise."""

KEEP = "keep the moekit form, which save_pretrained writes and which holds every SMoE-Dropout model exactly"


@dataclass(frozen=True, kw_only=True)
class StockRecipe:
    """How a dense family is written in a class of Transformers that differs in nothing but its experts."""

    model_type: str
    """Of the class with experts."""
    width: str = "moe_intermediate_size"
    """Its config's name of an expert's width."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Entries of its config that make it compute what the SMoE-Dropout layers do."""
    unused: tuple[str, ...] = ()
    """Entries of the dense config that it lacks and that change nothing."""
    undeclared: tuple[str, ...] = ()
    """Entries that the class reads although its config does not declare them."""
    caveat: str = ""
    """Who computes something else from such a checkpoint."""


NORMALISED = {"norm_topk_prob": True}
# Two families always have a shared expert. Ours has zeros, and a width that quantised formats can hold.
SHARED = {"shared_expert_intermediate_size": 32}

RECIPES: dict[str, StockRecipe] = {
    "llama": StockRecipe(model_type="mixtral", width="intermediate_size", unused=("pretraining_tp",)),
    "mistral": StockRecipe(model_type="mixtral", width="intermediate_size"),
    "granite": StockRecipe(model_type="granitemoe", width="intermediate_size"),
    "qwen2": StockRecipe(
        model_type="qwen2_moe",
        settings=NORMALISED | SHARED,
        caveat="llama.cpp ignores norm_topk_prob of Qwen2-MoE and is right with all experts active only",
    ),
    "qwen3": StockRecipe(
        model_type="qwen3_moe",
        settings=NORMALISED,
        unused=("layer_types", "max_window_layers"),
        undeclared=("head_dim",),
    ),
    "qwen3_5_text": StockRecipe(model_type="qwen3_5_moe_text", settings=SHARED),
    "olmo2": StockRecipe(
        model_type="flex_olmo",
        width="intermediate_size",
        settings=NORMALISED,
        caveat="vLLM ignores norm_topk_prob of FlexOlmo and is right with all experts active only",
    ),
}
"""By the dense model's type; a new family is one entry."""


@torch.no_grad()
def to_stock(model: PreTrainedModel, *, uniform_as_softmax: bool = False) -> PreTrainedModel:
    """Write an SMoE-Dropout language model as a stock Mixture-of-Experts model (`RECIPES`), for every K.

    ``softmax`` over the K chosen logits is softmax over all, top-k, renormalised, which Mixtral and its kin
    compute, and the routing weights' scale goes into the down projections; so the result equals `model` for
    every K (``num_experts_per_tok``), needs no moekit, and is read by whatever reads its class; engines that
    are known to read it wrongly are logged. Save it with `save_checkpoint`, which also writes what older
    readers look for in a config, or with `save_pretrained`.

    Args:
        model: From `to_smoe_dropout`; in memory, not sharded.
        uniform_as_softmax: For ``combine="uniform"``, which no stock class has: divide the router by 256. The
            same experts are chosen, and their weights differ by about the logits' deviation over 256.
            `max_logit_difference` tells by how much the logits do.

    Returns:
        A new model that shares with `model` all tensors but the down projections: what trains the one
        changes the other. Its routers are ordinary parameters.

    Raises:
        UnsupportedModelError: No stock class is known for this family.
        ValueError: The class cannot express this model; says why. Nothing is built then.
    """
    layers = require_smoe_layers(model)
    recipe = _recipe(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("a tensor of the model is not in memory; load it without offloading")
    for name, layer in layers.items():
        if reason := _obstacle(layer, uniform_as_softmax):
            raise ValueError(f"layer {name!r} {reason}; {KEEP}")
    config = _stock_config(model, recipe, layers)
    with init_empty_weights(include_buffers=False):
        stock: Any = _class_of(type(config))(config)
    tensors, places = _tensors(model, layers, stock)
    _check_fit(stock, tensors)
    for (weight, down), layer in zip(places, layers.values(), strict=True):
        router: Any = layer.router
        tensors[down] = tensors[down].clone(memory_format=torch.contiguous_format).mul_(router.scale)
        if router.combine == "uniform":
            tensors[weight] = tensors[weight] * SHRINK
    stock.load_state_dict(tensors, assign=True)
    stock.tie_weights()
    for module in stock.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(model.device)
    stock.generation_config = copy.deepcopy(model.generation_config)
    for caveat in filter(None, (recipe.caveat, width_caveat(next(iter(layers.values()))))):
        logger.warning("%s: %s", type(stock).__name__, caveat)
    return stock.train(model.training)


def width_caveat(layer: SMoEDropout) -> str | None:
    """A note on experts whose rows do not fill 16 bytes, as torch's grouped matrix product asks."""
    down_EID = layer.experts.down_proj
    width, unit = down_EID.shape[1], 16 // down_EID.element_size()
    if width % unit == 0:
        return None
    return (
        f"experts of width {width} are not run by Transformers' default, which needs a multiple of {unit}; "
        "load it with experts_implementation='eager', or convert with another num_experts"
    )


def _recipe(model: PreTrainedModel) -> StockRecipe:
    config = model.config
    recipe = RECIPES.get(config.model_type)
    if recipe is None or type(model) is not _class_of(type(config)):
        raise UnsupportedModelError(
            f"no stock Mixture-of-Experts class is known for {type(model).__name__}, only for the causal "
            f"language models of {', '.join(RECIPES)}; {KEEP}"
        )
    return recipe


def _obstacle(layer: SMoEDropout, uniform_as_softmax: bool) -> str | None:
    """Why no stock layer computes what this one does."""
    router, experts = layer.router, layer.experts
    if type(router) is not SMoERouter:
        return f"has a router of kind {getattr(router, 'kind', '?')!r}, which does not choose by R x"
    if router.combine == "residual":
        return "has combine='residual', whose weights grow in number with K where a stock layer's sum to 1"
    if router.bias.count_nonzero():
        return "has a router with a bias (it was centred or trained), which stock routers lack"
    if not experts.has_gate:
        return "has an FFN without a gate, where stock experts are gated"
    if experts.has_bias or layer.output_bias is not None:
        return "has an FFN with biases, which stock experts lack"
    if router.combine == "uniform" and not uniform_as_softmax:
        return "has combine='uniform', which stock classes express but nearly (uniform_as_softmax=True)"
    if router.combine == "uniform" and not torch.equal(router.weight * SHRINK / SHRINK, router.weight):
        return f"has a router whose rows cannot be divided by {1 / SHRINK:.0f} in {router.weight.dtype}"
    return None


def _stock_config(model: PreTrainedModel, recipe: StockRecipe, layers: dict[str, SMoEDropout]) -> Any:
    """The config of the stock class: what both have in common, the experts, and what nobody declared."""
    dense: Any = model.config
    kind = CONFIG_MAPPING[recipe.model_type]
    theirs, ours = ({entry.name: entry.default for entry in fields(c)} for c in (kind, type(dense)))
    theirs |= dict.fromkeys(recipe.undeclared)
    _check_config(dense, ours, theirs, recipe)
    left_dense = set(range(dense.num_hidden_layers)) - {int(name.split(".")[-2]) for name in layers}
    if left_dense and "mlp_only_layers" not in theirs:
        raise ValueError(f"layers {sorted(left_dense)} are dense, and {kind.model_type} cannot mix; {KEEP}")
    values = {
        k: v for k, v in dense.to_dict().items() if k not in NOT_COPIED and (k in theirs or k not in ours)
    }
    if "intermediate_size" in theirs:
        values["intermediate_size"] = dense.intermediate_size
    if "mlp_only_layers" in theirs:
        values |= {"mlp_only_layers": sorted(left_dense), "decoder_sparse_step": 1}
    if "layer_types" in ours and "layer_types" not in theirs:
        values["use_sliding_window"] = "sliding_attention" in dense.layer_types
    layer = next(iter(layers.values()))
    values |= recipe.settings | {
        next(key for key in EXPERT_COUNT_KEYS if key in theirs): layer.num_experts,
        recipe.width: layer.experts.down_proj.shape[1],
        "num_experts_per_tok": _one_k(layers.values()),
        "architectures": [_class_of(kind).__name__],
    }
    return kind(**values | {"attn_implementation": dense._attn_implementation})


def _class_of(config_class: type) -> Any:
    """The causal language model of a config's class, or ``None``."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)


def _check_config(dense: Any, ours: dict[str, Any], theirs: dict[str, Any], recipe: StockRecipe) -> None:
    """Refuse a dense config with a setting that the stock class does not know."""
    if dense.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={dense.hidden_act!r}: engines take stock experts to be SiLU-gated; {KEEP}"
        )
    for name in ours.keys() - theirs.keys() - NOT_COPIED - set(recipe.unused):
        if (value := getattr(dense, name)) != ours[name]:
            raise ValueError(f"{recipe.model_type} has no {name}={value!r} of {dense.model_type}; {KEEP}")
    if "layer_types" not in theirs and len(set(getattr(dense, "layer_types", None) or ())) > 1:
        raise ValueError(f"{recipe.model_type} cannot mix layers with and without a sliding window; {KEEP}")


def _one_k(layers: Iterable[SMoEDropout]) -> int:
    ks = [layer.active_experts for layer in layers]
    if len(set(ks)) > 1:
        raise ValueError(
            f"the layers have different numbers of active experts, {ks}, where a stock model has one: choose "
            f"it with set_active_experts(model, k), or {KEEP}"
        )
    return ks[0]


def _tensors(
    model: PreTrainedModel, layers: dict[str, SMoEDropout], stock: PreTrainedModel
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Views of the model's tensors by new names, and the names of each layer's router and down projection."""
    tensors = model.state_dict()
    paths = {module: name for name, module in stock.named_modules()}
    blocks = {block.name.rpartition(".")[0]: block for block in expert_layers(stock)}
    places = []
    for name in layers:
        block = blocks[name.rpartition(".")[0]]
        router, experts = f"{paths[block.router]}.weight", paths[block.experts_module]
        del tensors[f"{name}.router.bias"]
        weight, gate_up, down = (
            tensors.pop(f"{name}.{part}")
            for part in ("router.weight", "experts.gate_up_proj", "experts.down_proj")
        )
        tensors[router], tensors[f"{experts}.gate_up_proj"] = weight, gate_up
        tensors[f"{experts}.down_proj"] = down.transpose(1, 2)
        tensors |= _idle_shared_expert(stock, block.name, like=down)
        places.append((router, f"{experts}.down_proj"))
    return tensors, places


def _idle_shared_expert(stock: PreTrainedModel, block: str, like: Tensor) -> dict[str, Tensor]:
    """Zeros for the shared expert of a block, if it has one, and ones for its gate."""
    shapes = {k: v.shape for k, v in stock.state_dict().items() if k.startswith(f"{block}.shared_expert")}
    # Not zeros for the gate: llama.cpp writes sigmoid(x) as silu(x) / x.
    return {name: like.new_full(shape, float("_gate." in name)) for name, shape in shapes.items()}


def _check_fit(stock: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Refuse unless every tensor has its place."""
    wanted = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"{name!r} is {given.get(name, 'absent')} in the model and {wanted.get(name, 'absent')} in "
                f"{type(stock).__name__}; {KEEP}"
            )
