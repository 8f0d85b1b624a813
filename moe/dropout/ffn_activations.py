"""What the neurons of a dense model's FFNs say on a sample of real tokens: which of them fire together."""

# T tokens, N sampled tokens, F dense FFN width

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluating import evaluating
from ..masks import AttentionMasks, LayerMasks
from .dense_ffn import dense_ffns
from .partition import coactivation_partition


def ffn_activations(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    layers: Sequence[int] | None = None,
    *,
    max_tokens: int = 2048,
) -> dict[str, Float[Tensor, "N F"]]:
    """Run a dense model and keep what the down projections of its FFNs read of the first real tokens.

    Args:
        model: A dense model, as `dense_ffns` takes it.
        batches: Keyword arguments of the model, in random order, without padding or with an
            ``attention_mask``; read until there are `max_tokens` tokens.
        layers: Which FFNs, as in `dense_ffns`.
        max_tokens: N at most. Memory is that of the result, on the CPU: for each FFN 45 MB for 2,048 tokens
            of width 11,008 in bfloat16.

    Returns:
        By the name of the FFN, in the model's dtype.

    Raises:
        UnsupportedModelError: The model has no dense FFN.
        ValueError: No token came, or a mask does not say which tokens are padding.
    """
    ffns = dense_ffns(model, layers)
    parts: dict[str, list[Tensor]] = {ffn.name: [] for ffn in ffns}
    masks = AttentionMasks(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(masks.watch())
        for ffn in ffns:
            keep = _keeper(masks.around_module(ffn.down_projection, ffn.name), parts[ffn.name], max_tokens)
            stack.callback(ffn.down_projection.register_forward_pre_hook(keep).remove)
        for batch in batches:
            model(**batch)
            if all(sum(map(len, rows)) >= max_tokens for rows in parts.values()):
                break
    if not all(sum(map(len, rows)) for rows in parts.values()):
        raise ValueError("batches has no token that is not padding: nothing says which neurons fire together")
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _keeper(seen: LayerMasks, rows: list[Tensor], max_tokens: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden_TF = args[0].flatten(0, -2)
        counted_T = seen.of(len(hidden_TF))
        if counted_T is not None:
            hidden_TF = hidden_TF[counted_T.to(hidden_TF.device)]
        room = max_tokens - sum(map(len, rows))
        if room > 0:
            rows.append(hidden_TF[:room].cpu())

    return keep


def coactivation_partitions(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    num_experts: int,
    *,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_tokens: int = 2048,
) -> list[Int[Tensor, "E I"]]:
    """Form each expert of neurons that fire together: for ``to_smoe_dropout(..., partition=...)``.

    Args:
        model: As in `ffn_activations`.
        batches: As there.
        num_experts: E.
        seed: Of the clustering.
        layers: As there.
        max_tokens: As there.

    Returns:
        One partition for each FFN.

    Raises:
        UnsupportedModelError: The model has no dense FFN.
        ValueError: E does not divide an FFN's width, or no token came.
    """
    activations = ffn_activations(model, batches, layers, max_tokens=max_tokens)
    return [coactivation_partition(rows.float(), num_experts, seed) for rows in activations.values()]
