"""A bare FFN as tensors, and SMoE-Dropout layers made of it."""

import torch
from moekit.moe import ExpertWeights
from moekit.moe.dropout.experts import SlicedExperts
from moekit.moe.dropout.layer import SMoEDropout
from moekit.moe.dropout.router import Combine, SMoERouter
from torch import Tensor, nn

HIDDEN, WIDTH, EXPERTS = 12, 24, 4


def random_ffn(
    *,
    gated: bool = True,
    biased: bool = False,
    dtype: torch.dtype = torch.float64,
    hidden_size: int = HIDDEN,
    width: int = WIDTH,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    return ExpertWeights(
        up=draw(width, hidden_size),
        down=draw(hidden_size, width),
        gate=draw(width, hidden_size) if gated else None,
        up_bias=draw(width) if biased else None,
        gate_bias=draw(width) if biased and gated else None,
    )


def ffn_output(weights: ExpertWeights, hidden_TD: Tensor) -> Tensor:
    """The dense FFN, written once more."""
    up = nn.functional.linear(hidden_TD, weights.up, weights.up_bias)
    if weights.gate is None:
        return nn.functional.silu(up) @ weights.down.T
    gate = nn.functional.linear(hidden_TD, weights.gate, weights.gate_bias)
    return (nn.functional.silu(gate) * up) @ weights.down.T


def sliced_experts(weights: ExpertWeights, num_experts: int = EXPERTS) -> SlicedExperts:
    """Contiguous slices of an FFN."""
    experts = SlicedExperts(
        num_experts,
        weights.width // num_experts,
        weights.hidden_size,
        nn.SiLU(),
        has_gate=weights.gate is not None,
        has_bias=weights.up_bias is not None,
        like=weights.up,
    )
    for index in range(num_experts):
        part = slice(index * experts.down_proj.shape[1], (index + 1) * experts.down_proj.shape[1])
        experts.expert(index).copy_(expert_slice(weights, part))
    return experts


def expert_slice(weights: ExpertWeights, neurons: slice) -> ExpertWeights:
    return ExpertWeights(
        up=weights.up[neurons],
        down=weights.down[:, neurons],
        gate=None if weights.gate is None else weights.gate[neurons],
        up_bias=None if weights.up_bias is None else weights.up_bias[neurons],
        gate_bias=None if weights.gate_bias is None else weights.gate_bias[neurons],
    )


def random_router(
    combine: Combine = "softmax", *, scale: float = 1.0, trainable: bool = False, **sizes: int
) -> SMoERouter:
    like = torch.empty(1, dtype=torch.float64)
    router = SMoERouter(
        sizes.get("num_experts", EXPERTS),
        sizes.get("hidden_size", HIDDEN),
        combine=combine,
        scale=scale,
        trainable=trainable,
        like=like,
    )
    router.draw(torch.Generator().manual_seed(1), logit_std=1.0)
    return router


def random_layer(combine: Combine = "softmax", *, scale: float = 1.0, **kind: bool) -> SMoEDropout:
    return SMoEDropout(random_router(combine, scale=scale), sliced_experts(random_ffn(**kind)))


def random_hidden(num_tokens: int = 10) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
