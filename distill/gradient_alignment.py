"""Gradient alignment: the distillation gradient may not undo what the labels teach.

The released code projects the distillation gradient g1 away from the label gradient g0 where they disagree,
with copies of both. Subtracting a multiple of g0 only rescales it, so the sum is ``lambda g0 + g1`` with

    lambda = 1 + max(0, -<g1, g0>) / ||g0||^2

and two scalars are all that has to be measured.
"""

# D feature width

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

Scalar = Float[Tensor, ""]
WHERE = {
    "features": "the features that both heads read: one backward pass, any number of processes",
    "backbone": "the parameters that both losses reach",
    "all": "all parameters, as in the released code",
}
"""What the two gradients are by."""


def alignment_factor(dot: Scalar, squared_norm: Scalar) -> Scalar:
    """Return lambda; 1 where the gradients agree, or where the labels' is zero.

    Args:
        dot: ``<g1, g0>``.
        squared_norm: ``||g0||^2``.

    Reference: Yang et al., Dual-Head Knowledge Distillation (KDD 2025), arXiv:2411.08937; equal to its
    one-sided form of PCGrad (Yu et al., arXiv:2001.06782).
    """
    ratio = (-dot).clamp_min(0) / squared_norm
    return torch.where(squared_norm > 0, 1 + ratio, torch.ones_like(ratio))


def parameter_products(
    task_loss: Scalar, distillation_loss: Scalar, parameters: Sequence[nn.Parameter]
) -> tuple[Scalar, Scalar]:
    """``<g1, g0>`` and ``||g0||^2`` over parameters: two backward passes, whose graphs are kept.

    Over all parameters this is the released code's; over those that both losses reach (the backbone) it is
    what the paper's text suggests, and the two differ.

    Args:
        task_loss: Whose gradient is g0.
        distillation_loss: Whose gradient is g1.
        parameters: Where to measure. A loss that does not reach one has gradient 0 there.

    Returns:
        Both in float32, without graph. They are of this process's gradients: where several processes
        average theirs, the products of the averages are not the averages of the products; measure at the
        features instead.
    """
    wanted = [p for p in parameters if p.requires_grad]
    task = torch.autograd.grad(task_loss, wanted, retain_graph=True, allow_unused=True)
    distilled = torch.autograd.grad(distillation_loss, wanted, retain_graph=True, allow_unused=True)
    return products(task, distilled, task_loss)


def feature_products(
    task_loss: Scalar, distillation_loss: Scalar, features: Float[Tensor, "*tokens D"]
) -> tuple[Scalar, Scalar]:
    """``<g1, g0>`` and ``||g0||^2`` at the features that both heads read: no pass through the backbone.

    Every example's gradient is in one process, so over processes and micro-batches both are sums: add them
    up (`torch.distributed.all_reduce`), then take `alignment_factor`. Averaged losses must carry the same
    divisor in all of them.

    Args:
        task_loss: As for `parameter_products`.
        distillation_loss: As for `parameter_products`.
        features: Part of both losses' graphs.

    *Departs from the paper*: it compares gradients of parameters.
    """
    task = torch.autograd.grad(task_loss, [features], retain_graph=True, allow_unused=True)
    distilled = torch.autograd.grad(distillation_loss, [features], retain_graph=True, allow_unused=True)
    return products(task, distilled, task_loss)


def products(
    task: Sequence[Tensor | None], distilled: Sequence[Tensor | None], like: Tensor
) -> tuple[Tensor, Tensor]:
    """``<g1, g0>`` and ``||g0||^2`` of two lists of gradients, where ``None`` is zero.

    Args:
        task: g0.
        distilled: g1.
        like: Has the device of the results.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    dot = torch.zeros((), dtype=wide, device=like.device)
    squared_norm = torch.zeros_like(dot)
    for g0, g1 in zip(task, distilled, strict=True):
        if g0 is None:
            continue
        g0_wide = g0.to(wide).flatten()
        squared_norm += g0_wide.dot(g0_wide).to(dot.device)
        if g1 is not None:
            dot += g0_wide.dot(g1.to(wide).flatten()).to(dot.device)
    return dot, squared_norm


class GradientAlignment(nn.Module):
    """Lambda over a training: measured every few steps, smoothed, and part of the state.

    Attributes:
        every_n_steps: How often it is measured anew.
        smoothing: Weight of the past in the running mean of lambda; 0 for the last measurement alone.
        where: A name of `WHERE`.
        factor: Lambda.
        measured: Measurements so far.
        pending: Sums of a step of which some micro-batches are still to come.
        is_measuring: Whether this step has to measure.
        is_lagging: Whether a measurement holds from the next step on, because this one has several
            micro-batches, of which the first is scaled before the last is seen.

    Args:
        every_n_steps: At least 1.
        smoothing: In [0, 1).
        where: What the gradients are by.

    Raises:
        ValueError: One of them is out of range.

    *Departs from the paper*: it measures at each step, over all parameters, without smoothing.
    """

    factor: Tensor
    measured: Tensor
    pending: Tensor

    def __init__(self, every_n_steps: int = 1, smoothing: float = 0.0, where: str = "features") -> None:
        super().__init__()
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} is not an integer of at least 1")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} is not in [0, 1)")
        if where not in WHERE:
            raise ValueError(f"where={where!r} is not one of {', '.join(WHERE)}")
        self.every_n_steps = every_n_steps
        self.smoothing = smoothing
        self.where = where
        self.is_measuring = True
        self.is_lagging = False
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("measured", torch.zeros((), dtype=torch.long))
        self.register_buffer("pending", torch.zeros(2))

    def begin_step(self, step: int, num_parts: int) -> None:
        """Say which step it is.

        Args:
            step: Optimizer steps so far.
            num_parts: Micro-batches of this one.
        """
        self.is_measuring = step % self.every_n_steps == 0
        self.is_lagging = num_parts > 1

    @torch.no_grad()
    def observe(self, dot: Scalar, squared_norm: Scalar) -> None:
        """Take in what one micro-batch of this process says.

        Args:
            dot: ``<g1, g0>``.
            squared_norm: ``||g0||^2``.
        """
        both = torch.stack([dot, squared_norm]).to(self.pending)
        if self.is_lagging:
            self.pending += both
        else:
            self.update(*_summed_over_processes(both))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Turn what the micro-batches said into the next step's factor; every process calls it."""
        if self.is_lagging and self.is_measuring:
            self.update(*_summed_over_processes(self.pending))
            self.pending.zero_()

    @torch.no_grad()
    def update(self, dot: Scalar, squared_norm: Scalar) -> Tensor:
        """Take a measurement in and return lambda.

        Args:
            dot: ``<g1, g0>``, over everything that the step averages.
            squared_norm: ``||g0||^2``, over the same.
        """
        measured = alignment_factor(dot, squared_norm).to(self.factor)
        past = torch.where(self.measured > 0, self.smoothing, 0.0)
        self.factor.lerp_(measured, 1 - past)
        self.measured += 1
        return self.factor


def _summed_over_processes(both: Tensor) -> Tensor:
    """Add up over all processes, if there are several."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        both = both.clone()
        distributed.all_reduce(both)
    return both
