"""A training that passed every check: its model, its data and its arguments, whatever the command."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from .options import TrainingOptions
from .record import versions
from .staging import partial_folder
from .train_arguments import read_arguments_file
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


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoints of an unfinished run for `out` are."""
    return partial_folder(out.expanduser()) / "work" / "trainer"


def open_task(
    options: TrainingOptions,
    source: Source,
    *,
    label_order: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda labels: labels,
) -> TrainingTask:
    """Read labelled rows, the processor and the config, and build the model without weights.

    Args:
        options: What to do.
        source: The model's files.
        label_order: Puts the names of the labels into the order in which they are numbered.

    Raises:
        ValueError: One of them cannot be, or they do not fit each other.
    """
    name, rows = options.task, None
    if options.task == "token-classification":
        rows = read_tags(options)
    elif options.task == "classification":
        rows = read_classes(options)
        name = "images" if rows[0][0].picture is not None else "classification"
    processor = load_processor(options.tokenizer, source, name)
    labels = () if rows is None else label_order(rows[2])
    config = prepare_config(source, name, labels, processor)
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
