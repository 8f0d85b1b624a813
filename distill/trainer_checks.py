"""What no student can be trained with; found before models are loaded where the arguments are known."""

from math import ceil, floor
from typing import Any

from transformers import TrainingArguments


def check_sharded_heads(arguments: TrainingArguments) -> None:
    """Refuse what divides heads.

    Raises:
        ValueError: Says what does not.
    """
    plugin: Any = arguments.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "distillation works on whole heads, which DeepSpeed ZeRO-3 divides; take ZeRO-2 or FSDP2"
        )


def check_stop_epoch(stop_epoch: float, arguments: TrainingArguments, num_examples: int) -> None:
    """Refuse a second phase of which no step is left.

    Args:
        stop_epoch: When it begins.
        arguments: Of the training.
        num_examples: In an epoch.

    Raises:
        ValueError: Says when the training ends.
    """
    rounded = floor if arguments.dataloader_drop_last else ceil
    batches = ceil(rounded(num_examples / arguments.train_batch_size) / arguments.world_size)
    steps = max(ceil(batches / arguments.gradient_accumulation_steps), 1)
    total = arguments.max_steps
    if total <= 0:
        total = ceil(arguments.num_train_epochs * steps)
    if stop_epoch > (total - 1) / steps:
        raise ValueError(
            f"the teacher is to be dropped after epoch {stop_epoch:g}, and the training ends after "
            f"{total / steps:.4g} ({total} steps, {steps} an epoch): leave out stop_epoch (--stop-epoch), "
            "make it smaller, or train longer"
        )


def check_alignment(where: str, arguments: TrainingArguments) -> None:
    """Refuse to align by the gradients of parameters where no process has them whole.

    Args:
        where: Of the alignment.
        arguments: Of the training.

    Raises:
        ValueError: Says what there is, and to align at the features.
    """
    parts = arguments.gradient_accumulation_steps
    if where != "features" and (arguments.world_size > 1 or parts > 1):
        raise ValueError(
            f"gradients can be aligned over parameters ({where}) only where one process has the whole batch "
            f"at once; here are {arguments.world_size} processes and {parts} micro-batches: align at the "
            "features"
        )
