"""FSDP on the CPU, which accelerate offers for accelerators only: a patch for tests, never for users."""

from typing import Any

import accelerate
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

WRITTEN_FOR = "1.15."
"""The accelerate whose private names are replaced here."""


def allow_fsdp_on_cpu() -> None:
    """Let accelerate take gloo and the CPU for a GPU; before TrainingArguments are made.

    Raises:
        RuntimeError: This is another accelerate.
    """
    if not accelerate.__version__.startswith(WRITTEN_FOR):
        raise RuntimeError(
            f"the patch is for accelerate {WRITTEN_FOR}*, this is {accelerate.__version__}: see whether "
            "PartialState still has _prepare_backend and set_device that do what is replaced here"
        )
    patched: Any = PartialState
    patched._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    patched.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
