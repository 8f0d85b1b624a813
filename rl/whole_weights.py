"""The weights of a divided model, whole for a while, so that processes can sample each at its own pace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


@contextmanager
def whole_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Gather what FSDP2 or ZeRO-3 has divided; nothing to do for anybody else.

    Within it forward passes of the unwrapped model need no other process. All processes must enter and leave it
    together. It needs the memory of the whole model.

    Args:
        accelerator: Who has divided.
        model: As `Accelerator.prepare` returned it.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        with _unsharded(model):
            yield
    elif _zero_stage(accelerator) == 3:
        with _gathered(model):
            yield
    else:
        yield


def _zero_stage(accelerator: Accelerator) -> int | None:
    plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """FSDP2: its hooks find the weights there, and leave them."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@contextmanager
def _gathered(engine: Any) -> Iterator[None]:
    """ZeRO-3: its hooks would divide the weights again after each module, so they are off meanwhile."""
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for parameter in engine.module.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
