"""What every finished training leaves behind: run.json and the model card."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .options import CommonOptions, command_line
from .record import FORMAT, RUN_FILE, short_name, versions
from .training_job import TrainingJob


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A finished training."""

    job: TrainingJob
    model_class: str
    history: list[dict[str, Any]]
    """What Trainer logged."""
    steps: int
    warnings: tuple[str, ...]


@runtime_checkable
class CardRun(Protocol):
    """What a card tells of a finished training, whatever the command."""

    @property
    def job(self) -> Any:
        """Its options, and what it began with."""

    @property
    def model_class(self) -> str:
        """Of the result."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """For the reader."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card says that depends on the command."""

    tags: tuple[str, ...]
    title: str
    """Without the model's name."""
    summary: str
    """Markdown, like what follows."""
    numbers: str
    picture: str = ""
    needs_moekit: bool
    """Whether the model loads only after `import moekit.moe`."""
    after_loading: str = ""
    """More lines of Python."""


def write_run_file(
    run: TrainingRun, folder: Path, *, training: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Write `run.json`: what was asked, with what, and what came out.

    Args:
        run: What all commands have to say.
        folder: Where to.
        training: More of what was trained and how.
        metrics: What came out, beside the history of the training.
    """
    job, options = run.job, run.job.options
    write_facts(
        run,
        folder,
        training={
            "task": options.task,
            "start": job.start,
            "model_class": run.model_class,
            **training,
            "steps": run.steps,
            "processes": job.arguments.world_size,
            "learning_rate": job.arguments.learning_rate,
            "labels": list(job.labels),
        },
        fingerprint=job.examples.fingerprint,
        examples={"train": len(job.examples.train), "held_out": len(job.examples.held_out)},
        metrics={**metrics, "history": run.history},
    )


def write_facts(
    run: CardRun,
    folder: Path,
    *,
    training: Mapping[str, Any],
    fingerprint: str,
    examples: Mapping[str, int],
    metrics: Mapping[str, Any],
) -> None:
    """Write `run.json`, whatever the command.

    Args:
        run: What was done.
        folder: Where to.
        training: What was trained and how.
        fingerprint: Of the data.
        examples: How many, by use.
        metrics: What came out; numbers that JSON cannot hold become null.
    """
    options = run.job.options
    facts = {
        "format": FORMAT,
        "version": 1,
        "command": command_line(options.command, options),
        "config": config_values(options),
        "training": dict(training),
        "versions": versions() | {"accelerate": version("accelerate")},
        "platform": platform.platform(),
        "seed": options.seed,
        "data": {"source": options.data, "fingerprint": fingerprint, "examples": dict(examples)},
        "metrics": finite(dict(metrics)),
        "warnings": list(run.warnings),
    }
    text = json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False, default=str)
    (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def config_values(options: CommonOptions) -> dict[str, Any]:
    """Options as JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def finite(value: Any) -> Any:
    """The same without numbers that JSON cannot hold, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def model_name(model: str) -> str:
    """What people call a model: the last part of a hub id, or the name of the folder that it is in."""
    path = Path(model).expanduser()
    if not path.exists():
        return short_name(model)
    return (path.parent if path.is_file() else path).resolve().name


def made_by(run: CardRun) -> str:
    """The beginning of a card's summary."""
    return f"Made by moekit {versions()['moekit']} from `{run.job.options.model}`"


def write_model_card(run: CardRun, folder: Path, card: ModelCard) -> None:
    """Write `README.md` as the hub shows it."""
    job, options = run.job, run.job.options
    is_hub = job.start != "scratch" and not Path(options.model).exists()
    base = f"base_model: {options.model}\n" if is_hub else ""
    note = "import moekit.moe  # teaches transformers the moekit form\n" if card.needs_moekit else ""
    warnings = "".join(f"- {warning}\n" for warning in run.warnings)
    text = f"""---
library_name: transformers
{base}tags: [{", ".join(card.tags)}]
---

# {model_name(options.model)}: {card.title}

{card.summary}

## Numbers

{card.numbers}

{card.picture}

{f"## Warnings{chr(10)}{chr(10)}{warnings}" if warnings else ""}
## Load it

```python
{note}from transformers import {run.model_class}

model = {run.model_class}.from_pretrained("path/or/hub-id"){card.after_loading}
```

## How it was made

`{command_line(options.command, options)}`

`run.json` holds the settings and every number.
"""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    (folder / "README.md").write_text(text, encoding="utf-8")
