"""Qualities by what was kept, of earlier runs: a file of JSON lines that `--collapse-store` names."""

import json
from collections.abc import Sequence
from pathlib import Path


def read_runs(path: Path | None, fingerprint: str) -> list[dict[float, float]]:
    """Curves of earlier runs on models of the same shape.

    Args:
        path: The file; none is no runs, and so is one that is not there yet.
        fingerprint: Of the model's layers.

    Raises:
        ValueError: A line is not what `add_run` writes; names it.
    """
    if path is None or not path.is_file():
        return []
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            run = {float(share): float(quality) for share, quality in row["points"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of '{path}' is no run of --until-collapse-risk: {error}"
            ) from error
        if row.get("fingerprint") == fingerprint and run:
            runs.append(run)
    return runs


def add_run(path: Path, fingerprint: str, model: str, points: Sequence[tuple[float, float]]) -> None:
    """Append what a run has seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"fingerprint": fingerprint, "model": model, "points": [list(point) for point in points]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
