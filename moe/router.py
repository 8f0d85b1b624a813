"""Routers of any family: what their rule is, and how their per-expert tensors are cut."""

# T tokens, E experts, K active experts

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import layer as layers  # a cycle: for annotations only
from .storage import expert_counts

EXPERT_COUNT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
"""Config keys that count routed experts, in the spellings of all families."""

CONFIG_PARTS = ("text_config", "ffn_config", "thinker_config")
"""Parts of a composite config that may hold that count."""

_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_k", "moe_topk", "top_k_experts")
_GROUP_NAMES = ("num_group", "n_group", "num_expert_group")


@dataclass(frozen=True, slots=True)
class RouterConstraints:
    """What a router's rule demands of whoever removes experts."""

    scoring: str
    """``softmax`` (top-k before softmax is the same rule, renormalised), ``sigmoid``, or ``other``."""
    renormalises: bool
    """Whether the weights of the K choices are scaled to a constant sum."""
    has_correction_bias: bool
    """Whether a per-expert bias takes part in the choice that is not in the logits (GPT-OSS's is)."""
    num_groups: int = 1
    """Groups of equal size among which the router first chooses; 1 when it does not."""
    topk_groups: int = 1
    """How many of them a token may use."""
    scale: float = 1.0
    """Constant factor of the weights (`routed_scaling_factor`)."""
    returns_choices: bool = True
    """Whether the router itself returns (logits, weights, ids), not its block or some other form of them."""

    @property
    def group_rule(self) -> dict[str, Any]:
        """What routing among merged groups needs to know."""
        return {"renormalises": self.renormalises, "scale": self.scale}

    def check_group_probability(self, layer: str) -> None:
        """Refuse routers whose choice is not by softmax alone, or made outside of the router.

        Raises:
            ValueError: Says which rule the router has.
        """
        if not self.returns_choices:
            raise ValueError(
                f"router='logsumexp' needs a router that returns (logits, weights, ids); layer {layer!r} has "
                "none such; use router='redirect'"
            )
        if self.scoring != "softmax" or self.has_correction_bias or self.num_groups > 1:
            raise ValueError(
                f"router='logsumexp' needs a softmax router; layer {layer!r} has scoring={self.scoring!r}, "
                f"correction bias: {self.has_correction_bias}, groups: {self.num_groups}; "
                "use router='redirect'"
            )

    def check(self, keep: Sequence[int], *, num_experts: int, top_k: int, layer: str) -> None:
        """Refuse a set of experts that the router could not choose from.

        Raises:
            ValueError: Says what, got, allowed and the fix.
        """
        if len(set(keep)) != len(keep) or not all(0 <= e < num_experts for e in keep):
            raise ValueError(
                f"keep={list(keep)} must name different experts of 0..{num_experts - 1} (layer {layer!r})"
            )
        if not top_k <= len(keep):
            raise ValueError(
                f"cannot keep {len(keep)} of {num_experts} experts in layer {layer!r}: the router selects "
                f"top_k={top_k}; keep at least {top_k}"
            )
        if self.num_groups == 1:
            return
        size = num_experts // self.num_groups
        new_size = len(keep) // self.num_groups
        groups = [e // size for e in keep]
        fewest = max(min(size, 2), -(-top_k // self.topk_groups))  # a group's score is the sum of its top 2
        if groups != [g for g in range(self.num_groups) for _ in range(new_size)] or new_size < fewest:
            raise ValueError(
                f"layer {layer!r} routes within {self.num_groups} groups of {size} experts and uses "
                f"{self.topk_groups} of them for a token; keep={list(keep)} must keep equally many of each "
                f"group, in order, and at least {fewest} of each; router='redirect' has no such limit"
            )


def router_top_k(router: nn.Module, block: nn.Module, config: Any) -> int:
    """Find K: on the router, on the block, else in the config."""
    for owner in (router, block, config):
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if type(value) is int:
                return value
    return 1  # Switch's router is written for one choice and has no such setting


def _router_tensors(layer: "layers.ExpertLayer", num_experts: int) -> list[tuple[Any, str, Tensor, int]]:
    """Per-expert parameters and buffers of the router, and those that the block keeps for it.

    The first axis counts experts, possibly followed by choices without routed weights (LongCat's zero
    experts, Zaya's skip expert, Inkling's shared experts), which stay.
    """
    totals = _router_totals(layer, num_experts)
    candidates = [(m, n, t) for m in layer.router.modules() for n, t in _own_tensors(m)]
    candidates += [(layer.block, n, t) for n, t in _own_tensors(layer.block) if "bias" in n]
    for child_name, child in layer.block.named_children():
        if "statics" in child_name:
            candidates += [(child, n, t) for n, t in _own_tensors(child)]
    axes = ((m, n, t, _expert_axis(t, totals)) for m, n, t in candidates)
    return [(m, n, t, axis) for m, n, t, axis in axes if axis is not None]


def _router_totals(layer: "layers.ExpertLayer", num_experts: int) -> set[int]:
    """How many rows a per-expert tensor may have: E, or with the choices without routed weights."""
    owners = (layer.router, *layer.router.children())
    return {num_experts} | {n for o in owners for n in expert_counts(o).values() if n > num_experts}


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _expert_axis(tensor: Tensor, totals: set[int]) -> int | None:
    if tensor.ndim and tensor.shape[0] in totals:
        return 0
    if tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] in totals:
        return 1  # Ernie keeps its correction bias as [1, E]
    return None


@torch.no_grad()
def reduce_router(layer: "layers.ExpertLayer", num_experts: int, keep: list[int], new_ids: list[int]) -> None:
    """Keep the router's rows of `keep` and count `len(keep)` experts everywhere but in the model's config.

    Args:
        layer: The layer whose router is cut.
        num_experts: E before.
        keep: Kept experts, in their new order.
        new_ids: For each old expert, the new index that serves it (for tables that name experts).
    """
    removed = num_experts - len(keep)
    totals = _router_totals(layer, num_experts)
    for module, name, tensor, axis in _router_tensors(layer, num_experts):
        if name == "weight" and hasattr(module, "out_features"):
            module.out_features -= removed
        rows = torch.tensor([*keep, *range(num_experts, tensor.shape[axis])], device=tensor.device)
        cut = tensor.index_select(axis, rows)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
        else:
            setattr(module, name, cut)
    table = layer.router._buffers.get("tid2eid")
    if table is not None:
        layer.router.tid2eid = torch.tensor(new_ids, device=table.device, dtype=table.dtype)[table]
    for module in (*layer.router.modules(), layer.block):
        for name, value in expert_counts(module).items():
            if value in totals:
                setattr(module, name, value - removed)


def set_config_count(config: Any, num_experts: int, new: int) -> None:
    """Write the new number of routed experts under every spelling that `config` (and its parts) has."""
    for key in EXPERT_COUNT_KEYS:
        if getattr(config, key, None) == num_experts:
            setattr(config, key, new)
    for part in CONFIG_PARTS:
        if getattr(config, part, None) is not None:
            set_config_count(getattr(config, part), num_experts, new)


def _first_int(owners: Sequence[Any], names: Sequence[str], default: int) -> int:
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if type(value) is int), default)


def read_constraints(layer: "layers.ExpertLayer") -> RouterConstraints:
    """Find out the router's rule by watching it route, not by its name."""
    owners = (layer.router, layer.block)
    groups = _first_int(owners, _GROUP_NAMES, 1)
    topk_groups = _first_int(owners, ("topk_group",), groups)
    tensors = _router_tensors(layer, layer.num_experts)
    # One that is called plain "bias" belongs to a linear layer and so to the logits.
    has_bias = any(
        name.endswith("bias") or name.endswith("biases") for _, name, _, _ in tensors if name != "bias"
    )
    return RouterConstraints(
        has_correction_bias=has_bias,
        num_groups=max(groups, 1),
        topk_groups=max(topk_groups, 1),
        returns_choices=_returns_choices(layer),
        **_watch_rule(layer),
    )


_SCORES = {
    "softmax": lambda logits_TE, chosen_TK: logits_TE.softmax(-1).gather(1, chosen_TK),
    "sigmoid": lambda logits_TE, chosen_TK: logits_TE.gather(1, chosen_TK).sigmoid(),
}


def router_tensors(router: nn.Module) -> list[Tensor]:
    """Floating-point tensors of a router: parameters, and buffers where it is frozen."""
    tensors = (*router.parameters(), *router.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _random_tokens(layer: "layers.ExpertLayer") -> Tensor:
    like = next(iter(router_tensors(layer.router)), next(layer.experts_module.parameters()))
    hidden_TD = torch.randn(16, layer.input_size, generator=torch.Generator().manual_seed(0))
    return hidden_TD.to(like.device, like.dtype)


@torch.no_grad()
def _route_random_tokens(layer: "layers.ExpertLayer") -> Any:
    """Routing of 16 random tokens, or ``None`` where the block wants more than hidden states."""
    if layer.device.type == "meta":
        return None
    was_training = layer.block.training
    layer.block.eval()
    try:
        return layer.route(_random_tokens(layer))
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return None  # hash routing needs input_ids, Zaya the state of the layer before
    finally:
        layer.block.train(was_training)


@torch.no_grad()
def _router_output(layer: "layers.ExpertLayer") -> Any:
    """The router's output for random tokens; ``None`` where it wants more than hidden states."""
    if layer.device.type == "meta":
        return None
    try:  # not by calling the module: nobody who watches it must see this
        return layer.router.forward(_random_tokens(layer))
    except (TypeError, AttributeError, RuntimeError, IndexError, ValueError):
        return None


def _returns_choices(layer: "layers.ExpertLayer") -> bool:
    output = _router_output(layer)
    if not isinstance(output, tuple) or len(output) < 3 or not all(isinstance(o, Tensor) for o in output[:3]):
        return False
    _, weights, ids = output[:3]
    return weights.shape == ids.shape and ids.shape[-1] == layer.top_k and not ids.is_floating_point()


def router_shows_probabilities(layer: "layers.ExpertLayer") -> bool:
    """Whether the router's first output already sums to 1 for every token."""
    output = _router_output(layer)
    if output is None:
        return False
    shown = output if isinstance(output, Tensor) else output[layer.logits_index or 0]
    shown_TE = shown.float().flatten(0, -2)
    return bool((shown_TE >= 0).all()) and bool((shown_TE.sum(-1) - 1).abs().max() < 1e-2)


@torch.no_grad()
def _watch_rule(layer: "layers.ExpertLayer") -> dict[str, Any]:
    """Compare the router's weights on random tokens with each known rule, up to a common factor."""
    routing = _route_random_tokens(layer)
    if routing is None or routing.router_logits is None or (routing.expert_ids >= layer.num_experts).any():
        return {"scoring": "other", "renormalises": False}
    weights_TK = routing.routing_weights.float()
    total_T = weights_TK.sum(-1)
    renormalises = layer.top_k > 1 and bool((total_T / total_T.mean() - 1).abs().max() < 1e-2)
    for name, score in _SCORES.items():
        expected_TK = score(routing.router_logits.float(), routing.expert_ids)
        if renormalises:
            expected_TK = expected_TK / expected_TK.sum(-1, keepdim=True)
        ratio_TK = weights_TK / expected_TK.clamp_min(1e-12)
        if bool((ratio_TK / ratio_TK.mean() - 1).abs().max() < 2e-2):
            scale = _nearest_scale(layer, float(ratio_TK.mean()))
            return {"scoring": name, "renormalises": renormalises, "scale": scale}
    return {"scoring": "other", "renormalises": renormalises}


def _nearest_scale(layer: "layers.ExpertLayer", measured: float) -> float:
    """The factor that the router, block or config says; what is measured in bfloat16 is not exact."""
    named = [1.0, 1 / layer.top_k]
    for owner in (layer.router, layer.block, layer.config):
        named += [float(v) for n, v in vars(owner).items() if "scal" in n and type(v) in (int, float)]
    nearest = min(named, key=lambda value: abs(value - measured))
    return nearest if abs(nearest / measured - 1) < 1e-2 else round(measured, 5)


@torch.no_grad()
def mix_router_rows(
    layer: "layers.ExpertLayer", groups: Sequence[tuple[Sequence[int], Sequence[float], int]]
) -> None:
    """Set each core's row of every per-expert router tensor to the weighted mean of its group's rows.

    Args:
        layer: A layer whose router still has all E rows.
        groups: For each group its experts, their weights (which sum to 1) and its core.
    """
    for _, _, tensor, axis in _router_tensors(layer, layer.num_experts):
        if not tensor.is_floating_point():
            continue
        rows = tensor.detach().transpose(0, axis)
        mixed = [
            (
                rows[list(experts)].float()
                * torch.tensor(weights, device=rows.device).view(-1, *[1] * (rows.ndim - 1))
            ).sum(0)
            for experts, weights, _ in groups
        ]
        for row, (_, _, core) in zip(mixed, groups, strict=True):
            rows[core] = row.to(rows.dtype)
