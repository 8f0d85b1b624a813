"""TrainingArguments from the options of a training, and a check that all processes work together."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType

from .options import TrainingOptions

OWN_FLAGS = {
    "output_dir": "--out",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--lr-scheduler",
    "warmup_steps": "--warmup",
    "weight_decay": "--weight-decay",
    "bf16": "--bf16",
    "activation_checkpointing": "--gradient-checkpointing",
    "gradient_checkpointing": "--gradient-checkpointing",
    "save_steps": "--save-steps",
    "eval_steps": "--eval-steps",
    "logging_steps": "--logging-steps",
    "report_to": "--report-to",
    "seed": "--seed",
}
"""TrainingArguments that have an option of their own, which the file may not contradict."""
MOEKITS = (
    "resume_from_checkpoint",
    "save_strategy",
    "save_only_model",
    "eval_strategy",
    "disable_tqdm",
    "do_train",
)
"""TrainingArguments that moekit itself needs as they are."""
LEARNING_RATE = {"scratch": 3e-4}
PRETRAINED_LEARNING_RATE = 5e-5
OFFERED_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
}
"""What `accelerate launch` sets, and the type that has to come of it."""


def read_arguments_file(path: Path | None) -> dict[str, Any]:
    """The table of --training-arguments.

    Raises:
        ValueError: It is none, or names what is unknown or has its own option.
    """
    if path is None:
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--training-arguments '{path}' is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"--training-arguments '{path}' holds a {type(table).__name__}, not a table")
    known = {field.name for field in fields(TrainingArguments) if field.init}
    if unknown := sorted(table.keys() - known):
        raise ValueError(
            f"--training-arguments '{path}' names {', '.join(unknown)}, which TrainingArguments of "
            "Transformers do not have"
        )
    for name in table:
        if name in OWN_FLAGS:
            raise ValueError(f"--training-arguments '{path}' sets {name}; give {OWN_FLAGS[name]} instead")
        if name in MOEKITS:
            raise ValueError(
                f"--training-arguments '{path}' sets {name}, which moekit sets itself; leave it out"
            )
    return table


def training_arguments(
    options: TrainingOptions, folder: Path, start: str, file: dict[str, Any]
) -> TrainingArguments:
    """Build them; this also connects the processes that a launcher has started.

    Args:
        options: What the user asked for.
        folder: For checkpoints.
        start: Of the model, which decides the default learning rate.
        file: What `read_arguments_file` gave.

    Raises:
        ValueError: A value that Transformers refuses, or processes that do not work together.
    """
    schedulers = [kind.value for kind in SchedulerType]
    if options.lr_scheduler not in schedulers:
        raise ValueError(f"--lr-scheduler {options.lr_scheduler} is not one of {', '.join(schedulers)}")
    trackers = get_available_reporting_integrations()
    if missing := sorted(set(options.report_to) - {*trackers, "none"}):
        raise ValueError(
            f"--report-to {missing[0]} is not installed or not known to Transformers; there are: "
            f"{', '.join(trackers) or 'none'}"
        )
    check_launch(options.command)
    try:
        arguments = TrainingArguments(**{**_values(options, folder, start), **file})
    except (TypeError, ImportError) as error:
        raise ValueError(f"the training arguments cannot be: {error}") from error
    check_processes(arguments)
    return arguments


def _values(options: TrainingOptions, folder: Path, start: str) -> dict[str, Any]:
    """TrainingArguments by name, as the options and the machine have them."""
    is_accelerated = torch.accelerator.is_available()
    rate = LEARNING_RATE.get(start, PRETRAINED_LEARNING_RATE)
    length = (
        {"num_train_epochs": options.epochs or 1.0} if options.steps is None else {"max_steps": options.steps}
    )
    return {
        "output_dir": str(folder),
        **length,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": rate if options.learning_rate is None else options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler,
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "bf16": options.bf16,
        "activation_checkpointing": options.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False}
        if options.gradient_checkpointing
        else None,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no" if options.eval_steps is None else "steps",
        "eval_steps": options.eval_steps,
        "logging_steps": options.logging_steps,
        "report_to": list(options.report_to) or "none",
        "seed": options.seed,
        "disable_tqdm": True,
        # DeepSpeed and FSDP are silently left out where the CPU is asked for.
        "use_cpu": not is_accelerated and not asked_sharding(),
        "ddp_backend": None if is_accelerated or "WORLD_SIZE" not in os.environ else "gloo",
        "dataloader_pin_memory": is_accelerated,
    }


def check_launch(command: str) -> None:
    """Refuse what `accelerate launch` does with several processes on the CPU: it starts one.

    Args:
        command: Of moekit.

    Raises:
        ValueError: Says how to start.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and has started one; start them with "
            f"torchrun --nproc_per_node N -m moekit.scripts.cli {command} ..."
        )


def check_processes(arguments: TrainingArguments) -> None:
    """Refuse processes that do not know of each other.

    Raises:
        ValueError: Says what is wrong and how to start them.
    """
    state: Any = arguments.distributed_state
    started = int(os.environ.get("WORLD_SIZE", "1"))
    joined, kind = (1, "NO") if state is None else (state.num_processes, state.distributed_type.value)
    if started > 1 and (joined != started or kind == DistributedType.NO.value):
        raise ValueError(
            f"{started} processes were started and {joined} work together (distributed type {kind}); each "
            "would train a model of its own. Start DeepSpeed and FSDP with accelerate launch, and plain "
            "data-parallel training with torchrun"
        )


def check_sharding(found: DistributedType) -> None:
    """Refuse a run whose sharding was asked for and silently left out.

    Args:
        found: The type that the Trainer's accelerator has.

    Raises:
        ValueError: Says what came instead.
    """
    name = asked_sharding()
    if name is not None and found != OFFERED_SHARDING[name]:
        raise ValueError(
            f"accelerate was asked for {OFFERED_SHARDING[name].value} and gives {found.value}; unset "
            "ACCELERATE_USE_CPU, leave use_cpu out of --training-arguments; FSDP also needs accelerators"
        )


def asked_sharding() -> str | None:
    """What `accelerate launch` was asked for, of `OFFERED_SHARDING`."""
    return next((name for name in OFFERED_SHARDING if _is_set(name)), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes", "on")
