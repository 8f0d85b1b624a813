"""Route among groups of experts by the exact probability of a group: log-sum-exp of its experts' logits.

A softmax router gives a merged group the probability sum_{e in group} p_e. That is not linear in the token,
so no M-row router computes it; this hook does, from the E rows that the router keeps, before the choice of
the top k. Compare `redirect`, which chooses experts first and merges the choices afterwards.
"""

# T tokens, K active experts, E experts of the router, M groups

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def group_logits(
    logits_TE: Float[Tensor, "T E"], group_of_E: Int[Tensor, "E"], num_groups: int
) -> Float[Tensor, "T M"]:
    """Log of the summed exponentials of each group's logits; its softmax sums the experts' probabilities."""
    lowest = torch.finfo(logits_TE.dtype).min
    groups_TE = group_of_E.expand_as(logits_TE)
    highest_TM = logits_TE.new_full((len(logits_TE), num_groups), lowest)
    highest_TM = highest_TM.scatter_reduce(1, groups_TE, logits_TE.detach(), "amax")
    shares_TE = (logits_TE - highest_TM.gather(1, groups_TE)).exp()
    summed_TM = torch.zeros_like(highest_TM).index_add(1, group_of_E, shares_TE)
    return summed_TM.clamp_min(torch.finfo(summed_TM.dtype).tiny).log() + highest_TM


def route_by_group(module: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward hook of a softmax router: keep its logits, choose groups instead of experts."""
    logits_TE, weights_TK, ids_TK, *rest = output
    logits_TM = group_logits(logits_TE.float(), module.expert_group, module.num_groups)
    chosen_TK, groups_TK = logits_TM.softmax(-1).topk(ids_TK.shape[-1], dim=-1)
    if module.group_renormalises:
        chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
    chosen_TK = (chosen_TK * module.group_scale).to(weights_TK.dtype)
    return (logits_TE, chosen_TK, groups_TK, *rest)


def set_group_router(
    router: Any, group_of_E: Tensor, *, num_groups: int, renormalises: bool, scale: float
) -> None:
    """Make `router` choose among groups; `expert_group` is a buffer and so is saved with the model."""
    if "expert_group" not in router._buffers:
        router.register_buffer("expert_group", group_of_E)
        router.register_forward_hook(route_by_group)
    router.expert_group = group_of_E
    router.num_groups = num_groups
    router.group_renormalises = renormalises
    router.group_scale = scale


def pad_logits(module: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward hook of a router with removed rows: show as many logits as other layers, of probability 0."""
    logits_TE, *rest = output
    missing = module.logit_columns - logits_TE.shape[-1]
    return (nn.functional.pad(logits_TE, (0, missing), value=torch.finfo(logits_TE.dtype).min), *rest)


def set_logit_columns(router: Any, columns: int | None) -> None:
    """Make `router` show that many logits; ``None`` shows them as they are."""
    for key in [key for key, hook in router._forward_hooks.items() if hook is pad_logits]:
        del router._forward_hooks[key]
    if columns is not None:
        router.logit_columns = columns
        # Before the hooks of transformers that record the logits.
        router.register_forward_hook(pad_logits, prepend=True)
