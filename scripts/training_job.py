"""A training that passed every check: its model, its data and its arguments, whatever the command."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from .console import step
from .options import TrainingOptions
from .record import versions
from .staging import partial_folder
from .train_arguments import read_arguments_file, training_arguments
from .train_data import (
    Examples,
    class_examples,
    read_classes,
    read_tags,
    tag_examples,
    text_examples,
)
from .train_model import Source, load_processor, prepare_config, training_skeleton

NOT_SETTINGS = ("out", "debug")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTask:
    """What is learned by which model, before the examples are made."""

    name: str
    """A key of `TASKS`."""
    rows: tuple[Sequence[Any], Sequence[Any]] | None
    """To train and to evaluate on; None for causal-lm, whose text is read later."""
    labels: tuple[str, ...]
    processor: Any
    """Tokenizer or image processor."""
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    """The model on the meta device."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Options that passed every check, and what they name."""

    options: TrainingOptions
    source: Source
    config: PreTrainedConfig
    task: str
    """A key of `TASKS`."""
    start: str
    """scratch, or how the source's weights are begun with; for `moekit train` carve, copy or continue."""
    processor: Any
    """Tokenizer or image processor."""
    examples: Examples
    labels: tuple[str, ...]
    arguments: TrainingArguments

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.arguments.process_index == 0

    @property
    def folder(self) -> Path:
        """Of checkpoints."""
        return Path(str(self.arguments.output_dir))

    @property
    def inputs(self) -> dict[str, Any]:
        """Fingerprints of what the result depends on beside the options; a subclass may add some."""
        return {"model files": self.source.fingerprint, "examples": self.examples.fingerprint}

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON values."""
        given = {key: value for key, value in vars(self.options).items() if key not in NOT_SETTINGS}
        given["training_arguments"] = read_arguments_file(self.options.training_arguments)
        more = {**self.inputs, "processes": self.arguments.world_size, "versions": versions()}
        return json.loads(json.dumps(given | more, default=str))

    def lost_file(self, checkpoint: Path) -> str | None:
        """Name a file that only this kind of training has in a checkpoint, and that this one lacks."""
        return None


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoints of an unfinished run for `out` are."""
    return partial_folder(out.expanduser()) / "work" / "trainer"


def common_fields(
    options: TrainingOptions,
    source: Source,
    task: TrainingTask,
    examples: Examples,
    *,
    start: str,
    file: dict[str, Any],
) -> dict[str, Any]:
    """What `TrainingJob` itself holds, for the constructor of a subclass.

    Args:
        options: What to do.
        source: The model's files.
        task: What `open_task` gave.
        examples: What `read_examples` gave.
        start: See `TrainingJob`.
        file: What `read_arguments_file` gave.

    Raises:
        ValueError: What `training_arguments` refuses.
    """
    assert options.out is not None
    return {
        "options": options,
        "source": source,
        "config": task.config,
        "task": task.name,
        "start": start,
        "processor": task.processor,
        "examples": examples,
        "labels": task.labels,
        "arguments": training_arguments(options, checkpoint_folder(options.out), start, file),
    }


def open_task(
    options: TrainingOptions,
    source: Source,
    *,
    label_order: Callable[[tuple[str, ...]], tuple[str, ...]],
    processor_of: str | None = None,
) -> TrainingTask:
    """Read labelled rows, the processor and the config, and build the model without weights.

    Args:
        options: What to do.
        source: The model's files.
        label_order: Puts the names of the labels into the order in which they are numbered.
        processor_of: Folder or hub id of the tokenizer or image processor to take where the model has none.

    Raises:
        ValueError: One of them cannot be, or they do not fit each other.
    """
    name, rows = options.task, None
    if options.task == "token-classification":
        rows = read_tags(options)
    elif options.task == "classification":
        rows = read_classes(options)
        name = "images" if rows[0][0].picture is not None else "classification"
    wanted = options.tokenizer
    if wanted is None and processor_of is not None and not source.has_processor(name):
        kind = "image processor" if name == "images" else "tokenizer"
        step(f"'{source.name}' has no {kind} beside it: taking that of '{processor_of}'")
        wanted = processor_of
    processor = load_processor(wanted, source, name)
    labels = () if rows is None else label_order(rows[2])
    config = prepare_config(source, name, labels, processor)
    if name.endswith("classification") and processor.vocab_size > config.get_text_config().vocab_size:
        raise ValueError(
            f"the tokenizer has {processor.vocab_size} tokens and '{source.name}' a vocabulary of "
            f"{config.get_text_config().vocab_size}; name the model's own with --tokenizer"
        )
    return TrainingTask(
        name=name,
        rows=None if rows is None else rows[:2],
        labels=labels,
        processor=processor,
        config=config,
        skeleton=training_skeleton(config, name, source.name),
    )


def read_examples(options: TrainingOptions, task: TrainingTask) -> Examples:
    """The examples of a task.

    Raises:
        ValueError: Too little text, or a tokenizer that is not the model's.
    """
    if task.rows is None:
        return text_examples(options, task.processor, task.skeleton)
    make = tag_examples if task.name == "token-classification" else class_examples
    return make(options, *task.rows, task.labels, task.processor, task.skeleton)
