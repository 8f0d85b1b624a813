"""Random scores: the floor that every other must beat."""

import hashlib

import torch
from jaxtyping import Float64
from torch import Tensor

from ...moe.layer import ExpertLayer
from ...moe.statistics import LayerStatistics


def random_score(
    layer: ExpertLayer, statistics: LayerStatistics | None, *, seed: int = 0
) -> Float64[Tensor, " E"]:
    """Uniform in [0, 1), ``[E]``; the same for the same seed and layer name."""
    digest = hashlib.sha256(f"{seed} {layer.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
