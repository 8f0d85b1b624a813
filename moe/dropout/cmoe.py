"""CMoE: a carve with shared experts and an analytic router, from a few thousand tokens and no training."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from .build import smoe_layers
from .convert import to_smoe_dropout
from .dense_ffn import dense_ffns
from .ffn_activations import ffn_activations
from .partition import representative_neurons, shared_partition


def to_cmoe(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    num_experts: int = 16,
    num_shared: int = 4,
    *,
    active_experts: int | None = None,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_tokens: int = 2048,
) -> PreTrainedModel:
    """Carve the FFNs of a dense model into shared and routed experts by what their neurons do, in place.

    The neurons that fire most often form the shared experts, which are always active; the others are
    clustered by co-activation, and the neuron nearest to the middle of its cluster routes to it
    (`AnalyticRouter`). At K = E the model is the dense one.

    Args:
        model: As for `to_smoe_dropout`.
        batches: As for `ffn_activations`.
        num_experts: E, shared ones included.
        num_shared: Of them, in 1 to E - 1.
        active_experts: K to begin with, shared experts included; E by default.
        seed: Of the clustering.
        layers: Which FFNs, as in `dense_ffns`.
        max_tokens: How many tokens to look at.

    Returns:
        The model; K, training and saving are as after `to_smoe_dropout`.

    Raises:
        UnsupportedModelError: No dense FFN is found.
        ValueError: A number is out of range, or no token came. Nothing is changed then.

    Reference: Pei et al., CMoE (2025), arXiv:2502.04416.
    """
    ffns = {ffn.name: ffn for ffn in dense_ffns(model, layers)}
    activations = ffn_activations(model, batches, layers, max_tokens=max_tokens)
    partitions, representatives = [], []
    for name in ffns:
        rows_NF = activations.pop(name).float()
        partition_EI = shared_partition(rows_NF, num_experts, num_shared, seed)
        partitions.append(partition_EI)
        representatives.append(representative_neurons(rows_NF, partition_EI[num_shared:]))
    to_smoe_dropout(
        model,
        num_experts,
        "residual",
        seed,
        active_experts=active_experts,
        partition=partitions,
        router="analytic",
        layers=layers,
    )
    converted: dict[str, Any] = smoe_layers(model)
    for (name, ffn), neurons_R in zip(ffns.items(), representatives, strict=True):
        converted[name].router.represent(ffn.weights, neurons_R)
    return model
