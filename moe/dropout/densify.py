"""An SMoE-Dropout model becomes the plain dense model again: `to_dense`, the way back."""

# E experts, I expert width, F = E * I dense FFN width, D hidden (model) width, T tokens

import copy
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import mark_form
from ..discovery import has_experts
from ..router import EXPERT_COUNT_KEYS
from ..weights import ExpertWeights
from .analytic_router import AnalyticRouter
from .convert import require_smoe_layers
from .dense_ffn import dense_ffns
from .ffn_kinds import candidates
from .layer import SMoEDropout
from .observe import RoutedTokens, observe_routers
from .router import SMoERouter


@torch.no_grad()
def to_dense(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] | None = None
) -> PreTrainedModel:
    """Put the slices of every FFN side by side again, in place: the dense model of all experts active.

    Each expert's routing weight goes into its down projection. Where it is the same for every token, the
    result is exact: ``uniform``, ``residual`` whose gains are still zero, hash and THOR routers. ``softmax``
    weights differ from token to token, so their mean stands for them: that over `batches`, or ``scale / E``.
    How much the logits differ::

        before = copy.deepcopy(model)
        max_logit_difference(before, to_dense(model, batches), batch)

    The neurons are in the order of the experts, which is the original one for a contiguous partition.

    Args:
        model: From ``to_smoe_dropout(..., start="carve")``; in memory. One FFN is held twice at a time.
        batches: What the model is called with, to measure the mean weights; padding does not count.

    Returns:
        The model, whose classes and config are those of the dense one.

    Raises:
        UnsupportedModelError: The model has no SMoE-Dropout layers.
        ValueError: The experts are copies, not slices, or some are gone; or `batches` have no token. Nothing
            is changed then.
    """
    layers = require_smoe_layers(model)
    dense = _without_memory(model)
    paths = {module: path for path, module in dense.named_modules()}
    ffns = {ffn.name: ffn for ffn in dense_ffns(dense)}
    for name, layer in layers.items():
        _check_slices(name, layer, ffns[name].width)
    factors = _expert_factors(model, layers, batches)
    for name, layer in layers.items():
        for place in (name, *ffns[name].emptied):
            module = _allocate(dense.get_submodule(place), layer.experts.down_proj)
            model.set_submodule(place, module.train(layer.training))
        # The layer's own, which may have learned.
        model.set_submodule(paths[ffns[name].activation], layer.experts.act_fn)
        _join_slices(_read_ffn(model, name), layer, factors[name])
    _clear_config(model)
    return model


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model on the meta device, a source of fresh modules."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)(config)


def _check_slices(name: str, layer: SMoEDropout, dense_width: int) -> None:
    num_experts, width, _ = layer.experts.down_proj.shape
    if num_experts != layer.num_experts or num_experts * width != dense_width:
        raise ValueError(
            f"layer {name!r} has {num_experts} experts of width {width}, which are not slices of an FFN of "
            f"width {dense_width}: only a model of start='carve' with all its experts has a dense form"
        )


def _allocate(module: nn.Module, like: Tensor) -> nn.Module:
    """Give a module of the meta device memory: zeros, on which it can be run and read."""
    module = module.to(like.dtype).to_empty(device=like.device)
    for parameter in module.parameters():
        parameter.zero_()
    return module


def _read_ffn(model: PreTrainedModel, name: str) -> ExpertWeights:
    """Views of a dense FFN."""
    number = next(n for n, found in enumerate(candidates(model)) if found is not None and found.name == name)
    return dense_ffns(model, [number])[0].weights


def _join_slices(weights: ExpertWeights, layer: SMoEDropout, factors_E: Tensor) -> None:
    """Write a layer's experts side by side into an FFN, each times its routing weight."""
    width = layer.experts.down_proj.shape[1]
    for index, factor in enumerate(factors_E.tolist()):
        neurons = _neurons(weights, slice(index * width, (index + 1) * width))
        neurons.copy_(layer.experts.expert(index))
        neurons.down.mul_(factor)
    output_bias: Any = layer.output_bias
    if weights.down_bias is not None:
        weights.down_bias.copy_(output_bias)


def _neurons(weights: ExpertWeights, rows: slice) -> ExpertWeights:
    """Views of some neurons of an FFN."""
    return ExpertWeights(
        up=weights.up[rows],
        down=weights.down[:, rows],
        gate=None if weights.gate is None else weights.gate[rows],
        up_bias=None if weights.up_bias is None else weights.up_bias[rows],
        gate_bias=None if weights.gate_bias is None else weights.gate_bias[rows],
    )


def _expert_factors(
    model: PreTrainedModel, layers: dict[str, SMoEDropout], batches: Iterable[Mapping[str, Tensor]] | None
) -> dict[str, Tensor]:
    """What each expert's output is multiplied by when all are active, ``[E]`` for each layer."""
    measured = {} if batches is None else _mean_probabilities(model, layers, batches)
    factors = {}
    for name, layer in layers.items():
        router: Any = layer.router
        equal_E = _equal_probabilities(router)
        mean_E = measured.get(name, equal_E)
        if router.combine == "residual":
            factors[name] = router.scale * (1 + mean_E * router.gain.double().cpu())
        elif router.combine == "softmax" and isinstance(router, SMoERouter):
            factors[name] = router.scale * mean_E
        else:
            factors[name] = router.scale * equal_E
    return factors


def _equal_probabilities(router: Any) -> Float64[Tensor, "E"]:
    """The same for all experts that the router chooses among."""
    takes_part_E = torch.ones(router.num_experts, dtype=torch.float64)
    if isinstance(router, AnalyticRouter):
        takes_part_E[router.is_shared.cpu()] = 0
    return takes_part_E / takes_part_E.sum()


def _mean_probabilities(
    model: PreTrainedModel, layers: dict[str, SMoEDropout], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Float64[Tensor, "E"]]:
    """Mean over tokens of the softmax of each layer's logits, while all experts are active."""
    sums = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items()}
    num_tokens = dict.fromkeys(layers, 0)

    def add(routed: RoutedTokens) -> None:
        logits_TE = routed.router_logits if routed.counted is None else routed.router_logits[routed.counted]
        if isinstance(routed.router, AnalyticRouter):
            logits_TE = logits_TE.masked_fill(routed.router.is_shared, -torch.inf)
        sums[routed.layer] += logits_TE.double().softmax(-1).sum(0).cpu()
        num_tokens[routed.layer] += len(logits_TE)

    with _all_active(model, layers), observe_routers(model, add):
        for batch in batches:
            model(**batch)
    if not all(num_tokens.values()):
        raise ValueError(
            "no token of the batches reached some layer, so its mean routing weights are unknown"
        )
    return {name: sums[name] / num_tokens[name] for name in layers}


@contextmanager
def _all_active(model: PreTrainedModel, layers: dict[str, SMoEDropout]):
    """Evaluation with K = E, and everything as before afterwards."""
    ks, training = [layer.active_experts for layer in layers.values()], model.training
    try:
        model.eval()
        for layer in layers.values():
            layer.active_experts = layer.num_experts
        yield
    finally:
        model.train(training)
        for layer, k in zip(layers.values(), ks, strict=True):
            layer.active_experts = k


def _clear_config(model: PreTrainedModel) -> None:
    """Take out what `to_smoe_dropout` and `save_checkpoint` wrote."""
    config: Any = model.config
    declared = {entry.name for entry in fields(type(config))} | set(config.attribute_map)
    for name in {"num_experts_per_tok", *EXPERT_COUNT_KEYS} - declared:
        vars(config).pop(name, None)
    if has_experts(model):
        mark_form(model)
        return
    vars(config).pop("quantization_config", None)
