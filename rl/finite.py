"""NaN and infinity end a run before they are saved."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..moe.finite import nonfinite_weights


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
    if (bad := nonfinite_weights(accelerator, model)) is not None:
        names = ", ".join(bad[:3]) or "those of another process"
        raise NonFiniteError(
            f"weights hold NaN or infinity ({names}), so they are not saved; the last checkpoint is sound: "
            "lower the learning rate and go on from there"
        )
