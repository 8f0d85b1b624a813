"""Weights that are no numbers end a training before they are saved."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor


class NonFiniteWeightsError(ValueError):
    """A step has made weights NaN or infinite."""


def check_weights(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """Refuse weights that hold NaN or infinity, on all processes alike; every process calls it.

    Args:
        accelerator: Of the training.
        model: With all its parameters, or this process's part of each.
        step: After which this is.

    Raises:
        NonFiniteWeightsError: Says what to do.
    """
    if nonfinite_weights(accelerator, model) is not None:
        raise NonFiniteWeightsError(
            f"the weights hold NaN or infinity after step {step}, so they are not saved: the training has "
            "diverged. Lower the learning rate or lengthen the warmup; the last checkpoint is from before"
        )


def nonfinite_weights(accelerator: Accelerator, model: nn.Module) -> list[str] | None:
    """Look for weights that hold NaN or infinity on all processes; every process calls it.

    Args:
        accelerator: Of the training.
        model: With all its parameters, or this process's part of each.

    Returns:
        Names of those that this process holds; ``None`` where no process holds any.
    """
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for parameter in model.parameters():
        # No tensor of the parameter's size is made, and nothing is waited for.
        total += _sum(parameter).to(total.device)
    if torch.isfinite(accelerator.reduce(total)):  # pyright: ignore[reportArgumentType]
        return None
    return [name for name, parameter in model.named_parameters() if not torch.isfinite(_sum(parameter))]


def _sum(parameter: Any) -> Tensor:
    """In which NaN and infinity stay, and which in double precision finite numbers cannot overflow."""
    return _held_here(parameter).detach().sum(dtype=torch.float64)


def _held_here(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds, whatever divides it."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3, where the last part is filled up with anything
        part = parameter.ds_tensor
        start = distributed.get_rank(parameter.ds_process_group) * part.numel()
        return part[: max(0, min(part.numel(), parameter.ds_numel - start))]
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
