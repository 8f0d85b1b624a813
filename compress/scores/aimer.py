"""AIMER: how peaked an expert's weights are; needs no data."""

import torch
from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


@torch.no_grad()
def aimer(layer: ExpertLayer, statistics: LayerStatistics | None, *, seed: int = 0) -> Float64[Tensor, " E"]:
    """``-mean |w| / sqrt(mean w^2)`` over all entries of an expert's matrices, ``[E]``.

    Gaussian weights have -0.798; experts with heavier tails have more, and are kept. -1, the least there is,
    for an expert whose weights are all of one size, or all zero.

    Reference: AIMER, arXiv:2603.18492.
    """
    scores = []
    for expert in layer.experts():
        matrices = [tensor for _, tensor in expert.named_tensors() if tensor.ndim == 2]
        size = sum(matrix.numel() for matrix in matrices)
        norm_1 = torch.stack([torch.linalg.vector_norm(m, 1, dtype=torch.float32) for m in matrices]).sum()
        norm_2 = torch.stack([torch.linalg.vector_norm(m, 2, dtype=torch.float32) for m in matrices]).norm()
        peak = (norm_1 / size) / (norm_2 / size**0.5).clamp_min(1e-30)
        scores.append(-torch.where(norm_2 > 0, peak, 1.0))
    return torch.stack(scores).double().cpu()
