"""Several processes: that they know of each other, and that DeepSpeed knows of the batch."""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from .settings import PolicySettings


def check_processes(accelerator: Accelerator) -> None:
    """Refuse processes that would train each a policy of its own, which several launchers silently do.

    Raises:
        ValueError: Says how to start.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    kind = accelerator.distributed_type
    if accelerator.num_processes != started or (started > 1 and kind == DistributedType.NO):
        raise ValueError(
            f"{started} processes were started and accelerate knows of {accelerator.num_processes} "
            f"({kind.value}); each would train a policy of its own. Start DeepSpeed and FSDP with accelerate "
            "launch, and plain data-parallel training with torchrun --nproc_per_node N, on CPUs with "
            "ACCELERATE_USE_CPU=true"
        )


def prepare_deepspeed(accelerator: Accelerator, settings: PolicySettings) -> None:
    """Tell DeepSpeed what it would read from a data loader, where it clips, and that it will have to save."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    plugin: Any = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
    config["gradient_clipping"] = settings.max_grad_norm
    if plugin.zero_stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
