"""Turn the experts of a layer into factors."""

# T tokens, D hidden width, F FFN width

from typing import Any

import torch
from torch import Tensor

from ...moe.activations import neuron_activations
from ...moe.layer import ExpertLayer
from ...moe.low_rank import DOWN, UP, LowRankStorage, is_low_rank, make_low_rank, up_name
from ...moe.samples import LayerSample
from .decompose import decompose, second_moment

MIN_TOKENS = 16
"""Of an expert's own, below which its down projection is weighted by all sampled tokens."""


@torch.no_grad()
def factorise_layer(
    layer: ExpertLayer, rank: int, sparse_rows: float | int, sample: LayerSample | None = None
) -> dict[str, float]:
    """Replace the experts' matrices by factors, in place.

    Args:
        layer: Of a family whose experts are fused; merged or cut before.
        rank: R of gate and up together, and of down.
        sparse_rows: Share of the rows of each matrix that S holds, in [0, 1].
        sample: What the experts read; without it the decomposition is not weighted.

    Returns:
        ``error_up`` and ``error_down``: mean over experts of ``||W - U V - S|| / ||W||``.

    Raises:
        ValueError: Experts that are not fused, numbers out of range, or NaN or infinity.
    """
    rows = low_rank_rows(layer, sparse_rows)
    module: Any = layer.experts_module
    dense = {UP: getattr(module, up_name(module)).detach(), DOWN: module.down_proj.detach()}
    if module.is_transposed:
        dense = {name: weight.mT for name, weight in dense.items()}
    moments = _moments(layer, sample)  # of the dense experts, before they go
    make_low_rank(module, rank, rows, layer=layer.name)
    layer.storage = LowRankStorage(module)
    errors = {}
    for (name, weight_EOI), num_rows in zip(dense.items(), rows, strict=True):
        made: Any = module.get_submodule(name)
        distances = []
        for expert, weight_OI in enumerate(weight_EOI):
            factors = decompose(weight_OI, rank, num_rows, moments(name, expert))
            for part, tensor in zip((made.u, made.v, made.rows, made.row_index), factors, strict=True):
                part[expert] = tensor
            distances.append((factors.dense() - weight_OI).norm() / weight_OI.norm().clamp_min(1e-30))
        errors[f"error_{name.removesuffix('_map')}"] = float(torch.stack(distances).mean())
    return errors


def low_rank_rows(layer: ExpertLayer, sparse_rows: float | int) -> tuple[int, int]:
    """How many rows S has, in the map of gate and up together and in that of down.

    Args:
        layer: Of a family whose experts are fused.
        sparse_rows: Share of the rows, in [0, 1].

    Raises:
        ValueError: Experts that are not fused, or a number outside [0, 1].
    """
    if not 0 <= sparse_rows <= 1:
        raise ValueError(f"sparse_rows={sparse_rows} is not a share in [0, 1]")
    if not hasattr(layer.experts_module, "has_gate"):
        raise ValueError(
            f"the experts of layer {layer.name!r} are not fused as transformers fuses them "
            f"({type(layer.experts_module).__name__}), so they cannot become low-rank"
        )
    if is_low_rank(layer.experts_module):
        raise ValueError(f"the experts of layer {layer.name!r} are low-rank already")
    expert = layer.experts()[0]
    num_inner = expert.width * (1 if expert.gate is None else 2)
    return round(sparse_rows * num_inner), round(sparse_rows * expert.hidden_size)


def _moments(layer: ExpertLayer, sample: LayerSample | None) -> Any:
    """From a map and an expert to the second moment of what that reads."""
    if sample is None:
        return lambda name, expert: None
    experts = layer.experts()
    inputs_TD = sample.inputs.to(experts[0].up)
    shared_DD = second_moment(inputs_TD)
    logical = layer.expert_map
    inside: list[Tensor] = []
    for number, expert in enumerate(experts):
        served = [number] if logical is None else (logical == number).nonzero().flatten().tolist()
        own_T = torch.isin(sample.expert_ids, torch.tensor(served)).any(-1)
        rows_TD = inputs_TD[own_T] if int(own_T.sum()) >= MIN_TOKENS else inputs_TD
        inside.append(second_moment(neuron_activations(layer, expert, rows_TD)))
    return lambda name, expert: shared_DD if name == UP else inside[expert]
