"""``log cosh`` that is exact to the last digits at any magnitude."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def log_cosh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``log cosh x``, with the gradient ``tanh x``.

    ``|x| + log1p(exp(-2|x|)) - log 2`` never overflows, but near 0 it is a difference of numbers near log 2
    where the result is near ``x^2 / 2``. There it is ``log1p(2 sinh(x / 2)^2)``. Autograd keeps x alone.
    """
    return _LogCosh.apply(x)


class _LogCosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        size = x.abs()
        far = size + (-2 * size).exp().log1p() - math.log(2)
        near = (size / 2).sinh().square().mul(2).log1p()
        return torch.where(size < 1, near, far)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grad * x.tanh()
