"""SMoE-Dropout layers from a description, in the places of dense FFNs: for conversion and for loading."""

# E experts, D hidden (model) width, I expert width, F dense FFN width

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .analytic_router import AnalyticRouter
from .dense_ffn import DenseFFN, ffns_at
from .experts import SlicedExperts
from .hash_router import HashRouter, hand_out_token_ids, vocabulary_size
from .layer import SMoEDropout
from .router import COMBINE_RULES, SMoERouter
from .thor import ThorRouter

MAX_SCALE = 1e6
"""Far above any number of experts; a larger scale in a config is damage."""


@dataclass(frozen=True, kw_only=True)
class DropoutSpec:
    """What must be known of a model's SMoE-Dropout layers to build them anew, without their weights.

    Raises:
        ValueError: A value that no layer can have (a damaged or hostile config).
    """

    num_experts: int
    """E."""
    router: str
    """A key of `ROUTERS`."""
    combine: str
    """How the chosen experts are weighed: a rule of `SMoERouter`."""
    scale: float
    """Of the routing weights."""
    widths: dict[str, int]
    """I, the width of an expert, by the name of the layer."""

    def __post_init__(self) -> None:
        """Check everything."""
        if type(self.num_experts) is not int or self.num_experts < 2:
            raise ValueError(f"num_experts={self.num_experts!r} is not an integer of at least 2")
        if not isinstance(self.router, str) or self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} is not one of {', '.join(ROUTERS)}")
        if self.combine not in COMBINE_RULES:
            raise ValueError(f"combine={self.combine!r} is not one of {', '.join(COMBINE_RULES)}")
        if type(self.scale) not in (int, float) or not 0 < self.scale <= MAX_SCALE:
            raise ValueError(f"scale={self.scale!r} is not a positive number of at most {MAX_SCALE:g}")
        if not (isinstance(self.widths, dict) and self.widths):
            raise ValueError(f"widths={self.widths!r} names no layer")
        for name, width in self.widths.items():
            if type(width) is not int or width < 1:
                raise ValueError(f"layer {name!r}: experts of width {width!r} cannot be")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


RouterBuilder = Callable[[DropoutSpec, DenseFFN, Any], nn.Module]


def _frozen(spec: DropoutSpec, ffn: DenseFFN, config: Any, *, trainable: bool = False) -> nn.Module:
    rule: Any = {"combine": spec.combine, "scale": spec.scale}
    return SMoERouter(spec.num_experts, ffn.hidden_size, **rule, trainable=trainable, like=ffn.weights.up)


def _hash(spec: DropoutSpec, ffn: DenseFFN, config: Any) -> nn.Module:
    rule = {"combine": spec.combine, "scale": spec.scale}
    return HashRouter(spec.num_experts, vocabulary_size(config), **rule, like=ffn.weights.up[0])


def _thor(spec: DropoutSpec, ffn: DenseFFN, config: Any) -> nn.Module:
    return ThorRouter(spec.num_experts, combine=spec.combine, scale=spec.scale, like=ffn.weights.up[0])


def _analytic(spec: DropoutSpec, ffn: DenseFFN, config: Any) -> nn.Module:
    if (spec.combine, spec.scale) != (AnalyticRouter.combine, AnalyticRouter.scale):
        raise ValueError("router='analytic' needs combine='residual' and scale=1")
    return AnalyticRouter(spec.num_experts, ffn.weights, ffn.activation)


ROUTERS: dict[str, RouterBuilder] = {
    "random": _frozen,
    "learned": partial(_frozen, trainable=True),
    "hash": _hash,
    "thor": _thor,
    "analytic": _analytic,
}
"""How a layer chooses; each builds a router whose contents are still to be drawn or loaded from the spec, the
FFN whose place the layer takes, and the model's config."""


def build_layer(ffn: DenseFFN, spec: DropoutSpec, expert_width: int, config: Any) -> SMoEDropout:
    """Make the layer that takes the place of a dense FFN; of its tensors only the output bias has values."""
    weights = ffn.weights
    experts = SlicedExperts(
        spec.num_experts,
        expert_width,
        weights.hidden_size,
        ffn.activation,
        has_gate=weights.gate is not None,
        has_bias=weights.up_bias is not None,
        like=weights.up,
    )
    bias = weights.down_bias
    output_bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return SMoEDropout(ROUTERS[spec.router](spec, ffn, config), experts, output_bias, ffn.dropout)


def install_layers(model: PreTrainedModel, spec: DropoutSpec, active_experts: Any) -> None:
    """Put empty SMoE-Dropout layers into a freshly built dense model, before its weights are loaded.

    Raises:
        ValueError: The spec names a layer that the model does not have, or K is out of range, or there is not
            one for each layer.
    """
    ffns = ffns_at(model, spec.widths)
    for (name, ffn), k in zip(ffns.items(), one_k_each(active_experts, len(ffns)), strict=True):
        layer = build_layer(ffn, spec, spec.widths[name], model.config)
        layer.active_experts = k
        ffn.replace(model, layer)
    hand_out_token_ids(model)


def one_k_each(active_experts: Any, num_layers: int) -> list[int]:
    """Spell one number of active experts out for every layer.

    Raises:
        ValueError: Several are given, but not one for each layer.
    """
    if not isinstance(active_experts, int | list | tuple):
        raise ValueError(f"active_experts={active_experts!r} is neither an integer nor one for each layer")
    ks = [active_experts] * num_layers if isinstance(active_experts, int) else list(active_experts)
    if len(ks) != num_layers:
        raise ValueError(f"{len(ks)} numbers of active experts are given for {num_layers} layers")
    return ks


def smoe_layers(model: nn.Module) -> dict[str, SMoEDropout]:
    """The SMoE-Dropout layers of a model by name, in order; empty for any other model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SMoEDropout)}


def read_spec(model: nn.Module) -> DropoutSpec | None:
    """Describe a model's SMoE-Dropout layers; ``None`` when it has none."""
    layers = smoe_layers(model)
    if not layers:
        return None
    router: Any = next(iter(layers.values())).router
    return DropoutSpec(
        num_experts=router.num_experts,
        router=router.kind,
        combine=router.combine,
        scale=float(router.scale),
        widths={name: layer.experts.down_proj.shape[1] for name, layer in layers.items()},
    )


@torch.no_grad()
def fill_experts(layer: SMoEDropout, experts: Any) -> None:
    """Write an iterable of E `ExpertWeights` into a layer, one after the other."""
    for index, weights in enumerate(experts):
        layer.experts.expert(index).copy_(weights)
