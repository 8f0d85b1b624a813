"""NaN and infinity end a run before they are saved."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A gradient or a weight is NaN or infinite."""


def check_gradient(norm: Tensor) -> None:
    """Refuse to step along a gradient that is none.

    Args:
        norm: Of the whole gradient, the same on every process.

    Raises:
        NonFiniteError: It is NaN or infinite.
    """
    if not (torch.isfinite(norm) and norm >= 0):  # DeepSpeed's is -1 then
        raise NonFiniteError(
            f"the gradient's norm is {float(norm)}; the last checkpoint is sound: lower the learning rate, "
            "or compute in float32, and go on from there"
        )


def check_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity; every process calls it with its part of them.

    Raises:
        NonFiniteError: On every process, if one of them holds such a weight.
    """
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    count = torch.tensor([float(len(bad))], device=accelerator.device)
    total = accelerator.reduce(count, reduction="sum")
    if float(total) > 0:  # pyright: ignore[reportArgumentType]
        names = ", ".join(bad[:3]) or "those of another process"
        raise NonFiniteError(
            f"weights hold NaN or infinity ({names}), so they are not saved; the last checkpoint is sound: "
            "lower the learning rate and go on from there"
        )


def _is_finite(parameter: Tensor) -> bool:
    local: Any = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 leaves nothing in the parameter
    local = local.to_local() if hasattr(local, "to_local") else local
    # In double precision a sum of finite numbers cannot overflow.
    return bool(torch.isfinite(local.detach().sum(dtype=torch.float64)))
