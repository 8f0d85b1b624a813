"""``silu(gate) up w`` in fewer passes over memory than autograd takes."""

# T tokens, I expert width

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_swiglu(
    gate_up: Float[Tensor, "*rows two_I"], weights: Float[Tensor, "*rows 1"]
) -> Float[Tensor, "*rows I"]:
    """Multiply SwiGLU's hidden activations by one weight a row.

    Autograd's own products keep one more tensor of the result's size, and copy the gradients of the two
    halves together. Not differentiable twice.

    Args:
        gate_up: The gate's rows, then those of up, along the last axis.
        weights: One for each row.
    """
    if torch.is_grad_enabled():
        return _WeightedSwiGLU.apply(gate_up, weights)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up).mul_(weights)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, weights, activated)
        return (activated * up).mul_(weights)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        gate_up, weights, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_activated = grad * up
        grad_weights = (grad_activated * activated).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        torch.mul(grad, activated, out=grad_up).mul_(weights)
        torch.ops.aten.silu_backward.grad_input(grad_activated.mul_(weights), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weights
