"""Gradient alignment where the two heads part, in the one backward pass that there is anyway."""

# D feature width

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .gradient_alignment import GradientAlignment, products


def align(
    features: Float[Tensor, "*rows D"], alignment: GradientAlignment
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]]:
    """Split features in two: give one to the labels' loss and one to the distillation loss.

    On the way back the features get ``lambda g0 + g1``, g0 and g1 what the two losses send. Nothing is
    computed twice, and heads keep their own gradients: what the paper's text suggests. Several processes that
    train together add up the two scalars that lambda is made of.

    Args:
        features: What both heads read.
        alignment: Says when to measure, and remembers.

    *Departs from the paper*: it compares gradients of parameters, and scales the task head's too.
    """
    task, distilled = _Aligned.apply(features, alignment)
    return task, distilled


class _Aligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, alignment: GradientAlignment) -> tuple[Tensor, Tensor]:
        ctx.alignment = alignment
        return features.view_as(features), features.view_as(features)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, task: Tensor, distilled: Tensor
    ) -> tuple[Tensor, None]:
        alignment: GradientAlignment = ctx.alignment
        if alignment.is_measuring:
            alignment.observe(*products([task], [distilled], task))
        return torch.addcmul(distilled, task, alignment.factor.to(task.dtype)), None
