"""Rows of prompts: from files, datasets, or the procedural tasks of reasoning-gym."""

import difflib
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..rl import Prompt
from .train_rows import read_rows

GYM = "reasoning-gym:"
GYM_SIZE = 1000
EVAL_SEED = 1_000_003
"""Added to the seed of procedural tasks for held-out ones, which are then others."""


def read_prompt_rows(source: str, *, seed: int) -> list[dict[str, Any]]:
    """Rows of a source, in its order.

    Args:
        source: A file, a `datasets` name, or ``reasoning-gym:NAME[:KEY=VALUE,...]``.
        seed: Of procedural tasks.

    Raises:
        ValueError: It cannot be read, has no rows, or rows that are no tables.
    """
    rows = _gym_rows(source, seed) if source.startswith(GYM) else read_rows(source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} of '{source}' is a {type(row).__name__}, not a table of columns")
        if None in row:  # where csv puts what is too much
            raise ValueError(f"row {number} of '{source}' has more fields than there are columns")
    return [dict(row) for row in rows]


def import_gym(source: str) -> Any:
    """The package that makes procedural tasks.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"--data {source} needs the package reasoning-gym: pip install 'moekit[rl]'"
        ) from error
    return reasoning_gym


def _gym_rows(source: str, seed: int) -> list[dict[str, Any]]:
    gym = import_gym(source)
    _, name, *settings = source.split(":", 2)
    given = _gym_settings(source, settings[0] if settings else "")
    _check_gym(source, name, given)
    try:
        data = list(gym.create_dataset(name, **{"size": GYM_SIZE, "seed": seed, **given}))
    # Each task has its own way to refuse settings, or none and fails at them.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"reasoning-gym cannot make the task of '{source}': {reason}") from error
    return [
        {
            "prompt": row["question"],
            "question": row["question"],
            "answer": row["answer"],
            "task": name,
            "metadata": row["metadata"],
        }
        for row in data
    ]


def _check_gym(source: str, name: str, given: Mapping[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, DATASETS)) or "none of a similar name"
        raise ValueError(f"'{source}': reasoning-gym has no task {name!r}; it has {near}")
    config: Any = DATASETS[name][1]
    known = [field.name for field in fields(config)]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(
            f"'{source}': the task {name} has no setting {unknown[0]!r}; its settings: {', '.join(known)}"
        )


def _gym_settings(source: str, text: str) -> dict[str, Any]:
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--data {source}: {part!r} is not KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def apply_template(rows: Sequence[Mapping[str, Any]], template: str | None) -> list[dict[str, Any]]:
    """Rows whose prompt is made of their columns.

    Args:
        rows: Of any columns.
        template: With the names of columns in braces; ``None`` leaves prompts as they are.

    Raises:
        ValueError: A column that a row has not, or a template that is none.
    """
    if template is None:
        return [dict(row) for row in rows]
    text, found = template.replace("\\n", "\n"), []
    for number, row in enumerate(rows, 1):
        try:
            found.append({**row, "prompt": text.format_map(row)})
        except KeyError as error:
            raise ValueError(
                f"--prompt-template {template!r} names the column {error}, which row {number} has not; its "
                f"columns: {', '.join(map(str, row))}"
            ) from error
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"--prompt-template {template!r} is no template: {error}") from error
    return found


def held_out(
    rows: list[dict[str, Any]], count: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on and rows to evaluate on, at most a tenth; the same split for the same seed."""
    count = min(count, len(rows) // 10)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    evaluated = set(order[:count])
    return (
        [row for number, row in enumerate(rows) if number not in evaluated],
        [rows[number] for number in sorted(evaluated)],
    )


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes when a prompt does, or how it is cut into tokens, or a column of its row."""
    text = json.dumps([[prompt.ids, prompt.columns] for prompt in prompts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
