"""Run a merged layer: the router keeps its E rows, `expert_map` sends each to one of M experts.

The map is a buffer of the experts module and a hook before its forward applies it, so the router, its
auxiliary loss and its statistics go on in logical experts. When two choices of one token meet in one group,
the group's expert serves both; where that happens often, their weights add and the second is marked absent
(index M), which transformers' experts skip: the merged layer does less work, and says the same.
"""

# T tokens, K active experts, E logical experts, M physical experts

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

WORTH_FOLDING = 0.25
"""Share of repeated choices from which folding saves more than the masks cost that it needs in transformers'
experts; measured on a CPU by `benchmarks/forward_speed.py`."""


def fold_duplicates(
    expert_ids_TK: Int[Tensor, "T K"], weights_TK: Float[Tensor, "T K"], absent: int
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Add the weights of a token's equal choices onto the first and mark the others `absent` with weight 0.

    Args:
        expert_ids_TK: Chosen experts; equal ids may occur in a row.
        weights_TK: Their weights.
        absent: The id that the experts' forward skips.

    Returns:
        Ids and weights of the same shape; for any function f of an expert, the sum over k of
        ``weights[t, k] * f(ids[t, k])`` is unchanged.
    """
    same_TKK = expert_ids_TK.unsqueeze(2) == expert_ids_TK.unsqueeze(1)
    is_repeat_TK = same_TKK.tril(-1).any(-1)
    # Not a matmul: autocast would round the weights to bfloat16.
    summed_TK = (same_TKK * weights_TK.unsqueeze(1)).sum(-1)
    return expert_ids_TK.masked_fill(is_repeat_TK, absent), summed_TK.masked_fill(is_repeat_TK, 0)


def redirect(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an experts module called as ``(hidden, expert_ids, weights)``."""
    hidden, ids, weights = (*args, *kwargs.values())
    if ids.ndim == 3:  # Switch passes a one-hot mask [T, 1, E], all zeros for a token over capacity
        return (hidden, _sum_by_group(ids, module.expert_map, len(module)), weights), {}
    ids = module.expert_map[ids]
    if ids.shape[-1] > 1 and not has_constants(module) and passes_over_absent(module):
        ids, weights = fold_duplicates(ids, weights, module.num_experts)
    return (hidden, ids, weights), {}


def _sum_by_group(values: Tensor, expert_map: Tensor, num_groups: int) -> Tensor:
    out = values.new_zeros(*values.shape[:-1], num_groups)
    return out.index_add(-1, expert_map, values)


def redirect_scores(
    module: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Forward hook of Llama-4's router: ``(scores [T, E], logits)`` to ``(scores [T, M], logits)``.

    Exact for top-1 only: Llama-4 multiplies the *input* of an expert by its score, so two choices in one
    group do not add.
    """
    scores, logits = output
    return _sum_by_group(scores, module.expert_map, module.num_physical_experts), logits


def redirect_dispatch(module: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward hook of JetMoE's router: sort its choices by physical instead of logical expert."""
    order, token, gates, sizes, logits = output
    ids = torch.arange(len(sizes), device=order.device).repeat_interleave(
        torch.tensor(sizes, device=order.device)
    )
    physical, by_physical = module.expert_map[ids].sort(stable=True)
    counts = physical.bincount(minlength=module.num_physical_experts).tolist()
    return order[by_physical], token[by_physical], gates[by_physical], counts, logits


def passes_over_absent(module: Any) -> bool:
    """Whether this experts' forward, as it is now dispatched, passes over a choice of the id `num_experts`.

    Transformers' own implementations do once `_is_expert_parallel` is set; the eager loop of some families
    does not (GPT-OSS).
    """
    if not getattr(module, "folds_choices", False):
        return False
    return module.eager_folds_choices or module.config._experts_implementation not in (None, "eager")


def _eager_passes_over_absent(module: Any) -> bool:
    """Ask the family's eager loop, on zero-size stand-ins: an id out of range would end a CUDA process."""
    eager = type(module).forward.__wrapped__
    stand_in = copy.copy(module)
    stand_in._parameters = {
        name: torch.zeros((), dtype=p.dtype, device="cpu").expand(p.shape)
        for name, p in module.named_parameters(recurse=False)
    }
    ids_TK = torch.tensor([[module.num_experts]], device="cpu")
    zeros = torch.zeros(1, 1, device="cpu")  # named: checkpoints are loaded inside a meta device context
    try:
        eager(stand_in, zeros, ids_TK, zeros)
    except (RuntimeError, IndexError):
        return False
    return True


def set_expert_map(module: Any, expert_map: Tensor, hook: Callable[..., Any]) -> None:
    """Register or replace the buffer `expert_map` of `module`, and its hook once."""
    if "expert_map" in module._buffers:
        module.expert_map = expert_map
        return
    module.register_buffer("expert_map", expert_map)
    if hook is redirect:
        module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        module.register_forward_hook(hook)


def repeated_share(num_groups: int, top_k: int) -> float:
    """Share of a token's choices that meet an earlier one in its group, if choices were independent."""
    distinct = num_groups * (1 - (1 - 1 / num_groups) ** top_k)
    return 1 - distinct / top_k


def skip_absent_choices(module: Any, num_groups: int, top_k: int) -> None:
    """Fold a token's equal choices from now on, where the experts' forward can be spared the repeats.

    Args:
        module: The experts.
        num_groups: M.
        top_k: K.
    """
    if repeated_share(num_groups, top_k) < WORTH_FOLDING:
        return
    if hasattr(module, "_is_expert_parallel"):
        pass_over_absent(module)


def pass_over_absent(module: Any) -> None:
    """Let transformers' experts skip ids >= num_experts, where those that are absent are sent."""
    if not getattr(module, "folds_choices", False):
        module.eager_folds_choices = "up_map" in module._modules or _eager_passes_over_absent(module)
    module._is_expert_parallel = module.folds_choices = True


def has_constants(module: Any) -> bool:
    """Whether some of its experts say the same to every token; see `constants.py`."""
    return "constant_outputs" in module._buffers


def clear_expert_map(module: Any) -> None:
    """Undo `set_expert_map` and `skip_absent_choices`."""
    if "expert_map" not in module._buffers:
        return
    if has_constants(module):
        raise ValueError(
            "a layer with constant experts cannot be changed again; start from the original model"
        )
    del module.expert_map
    if getattr(module, "folds_choices", False):
        module._is_expert_parallel = module.folds_choices = False
    ours = (redirect, redirect_scores, redirect_dispatch)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
