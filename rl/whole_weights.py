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

    Within it forward passes of the unwrapped model need no other process. All processes must enter and leave
    it together. It needs the memory of the whole model.

    Args:
        accelerator: Who has divided.
        model: As `Accelerator.prepare` returned it.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        context = _unsharded(model)
    elif _zero_stage(accelerator) == 3:
        context = _gathered(model)
    else:
        yield
        return
    policy: Any = accelerator.unwrap_model(model)
    with context:
        policy.is_whole = True
        try:
            yield
        finally:
            policy.is_whole = False


def _zero_stage(accelerator: Accelerator) -> int | None:
    plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """FSDP2: its hooks find the weights there, and leave them; afterwards all is as it was configured."""
    from torch.distributed.fsdp import FSDPModule

    # Whatever runs first becomes the root for good, and generation runs what is in the model.
    model._get_fsdp_state()._lazy_init()
    parts: Any = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = dict.fromkeys(group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups)
    resharding = {group: group.post_forward_mesh_info for group in groups}
    for part in parts:
        part.unshard()
    try:
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, configured in resharding.items():
            group.post_forward_mesh_info = configured
        for part in parts:
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
