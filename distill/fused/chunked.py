"""Hidden states and a head in, a loss out: the logits of all rows at once never exist."""

# N rows, C real columns of the head, D hidden width

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .heads import Head, Teacher, TopK, check_states, check_teacher
from .objective import Objective
from .sweep import Job, sweep


def fused_loss(
    hidden: Float[Tensor, "N D"],
    head: Head,
    objective: Objective,
    *,
    teacher: Teacher | None = None,
    labels: Int[Tensor, " N"] | None = None,
    num_items: int | Int[Tensor, ""] | None = None,
    tile_elements: int | None = None,
) -> Float[Tensor, ""]:
    """Compute the mean over rows of a loss of logits, tile by tile.

    Gradients by hidden states, weight and bias, where they are wanted, are made in the same sweep, so that no
    logit is computed twice; backward only scales them. (A second backward through a retained graph sweeps
    again.) They cannot be differentiated further. Products run in the hidden states' dtype or autocast's,
    everything else in single precision at least.

    Args:
        hidden: Of the rows that count, packed. No rows give 0, which stays in the graph.
        head: The student's.
        objective: What to compute, such as ``kl(temperature=2.0)``.
        teacher: Logits, hidden states with their head, or the likeliest tokens; a constant.
        labels: Of the rows, each below C.
        num_items: What the sum over rows is divided by; N by default. With gradient accumulation give the
            rows of all accumulated batches. 0 counts as 1.
        tile_elements: Most logits of one side that exist at a time; ``None`` for what was measured.

    Raises:
        ValueError: Shapes that do not fit, a teacher or labels that are missing or not wanted, or a number
            out of its range.
    """
    _check(hidden, head, objective, teacher, labels, num_items)
    num_rows = len(hidden)
    count = num_items if isinstance(num_items, int) else num_rows
    device = hidden.device.type
    is_autocast = torch.is_autocast_enabled(device)
    job = Job(
        head=head,
        objective=objective,
        teacher=teacher,
        labels=labels,
        scale=1 / max(count, 1),
        dtype=torch.get_autocast_dtype(device) if is_autocast else hidden.dtype,
        is_autocast=is_autocast,
        tile_elements=tile_elements,
    )
    loss = _FusedLoss.apply(hidden, head.weight, head.bias, job, torch.is_grad_enabled())
    if isinstance(num_items, Tensor):  # whose value is not read: that would wait for the device
        loss = loss * (max(num_rows, 1) / num_items.to(loss.device).clamp_min(1))
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, is_differentiated: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.job = job
        hidden_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
        wanted = hidden_wanted, weight_wanted, bias_wanted
        ctx.wanted = wanted if is_differentiated else (False, False, False)
        loss, ctx.gradients = sweep(hidden, job, ctx.wanted)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, *_ = ctx.saved_tensors
        gradients = ctx.gradients or sweep(hidden, ctx.job, ctx.wanted)[1]
        ctx.gradients = None  # they are given away, and may become a parameter's own
        # On the CPU a look at the value is free and saves a pass over the weight's gradient.
        if not (grad.device.type == "cpu" and grad == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad)
        return (*gradients, None, None)


def _check(
    hidden: Tensor,
    head: Head,
    objective: Objective,
    teacher: Teacher | None,
    labels: Tensor | None,
    num_items: int | Tensor | None,
) -> None:
    check_states("student", hidden, head)
    for name, given, needed in (
        ("teacher", teacher is not None, objective.needs_teacher),
        ("labels", labels is not None, objective.needs_labels),
    ):
        if given != needed:
            got, fix = ("got some", "leave them out") if given else ("got none", f"pass {name}=")
            raise ValueError(f"{name}: {got}, but the objective takes {'some' if needed else 'none'}; {fix}")
    if teacher is not None:
        if isinstance(teacher, TopK) != objective.needs_ids:
            wanted = "its likeliest tokens (TopK)" if objective.needs_ids else "logits or hidden states"
            raise ValueError(f"teacher: got a {type(teacher).__name__}, but the objective takes {wanted}")
        check_teacher(teacher, len(hidden), head.width, compares_columns=objective.compares_columns)
    if labels is not None and tuple(labels.shape) != (len(hidden),):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and the student's hidden states {len(hidden)} rows; "
            "pack both with the same valid rows"
        )
    if isinstance(num_items, int) and num_items < 0:
        raise ValueError(f"num_items={num_items} is not a number of rows; give 0 or more, or None for N")
