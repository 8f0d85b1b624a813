"""Qualities by what was kept, of earlier runs: a file of JSON lines that `--collapse-store` names."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..compress.tipping_point.controller import curve_of_runs

Points = list[tuple[float, float]]
"""Shares kept and qualities."""


def read_runs(path: Path | None, kind: dict[str, Any] | None = None) -> list[Points]:
    """Points of earlier runs.

    Args:
        path: The file; none is no runs, and so is one that is not there yet.
        kind: Of the runs that are wanted; all of them unless given.

    Raises:
        ValueError: A line is not what `add_run` writes; names it.
    """
    if path is None or not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--collapse-store '{path}' is no file of text lines: {error}") from error
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            points = [(float(share), float(quality)) for share, quality in row["points"]]
            curve_of_runs([dict(points)])
            found = row["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of '{path}' is no run of --until-collapse-risk ({type(error).__name__}: "
                f"{error}); remove that line, or name another --collapse-store"
            ) from error
        if points and kind in (None, found):
            runs.append(points)
    return runs


def check_store(path: Path | None) -> None:
    """Refuse a store that could not be read or written, before any work.

    Raises:
        ValueError: Says why.
    """
    if path is None:
        return
    read_runs(path)
    place = path if path.exists() else next(p for p in path.absolute().parents if p.exists())
    if not os.access(place, os.W_OK) or (place != path and not place.is_dir()):
        raise ValueError(f"--collapse-store '{path}' cannot be written: '{place}' does not allow it")


def add_run(path: Path, kind: dict[str, Any], model: str, points: Sequence[tuple[float, float]]) -> None:
    """Append what a run has seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"kind": kind, "model": model, "points": [list(point) for point in points]}
    is_open_line = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_open_line + json.dumps(row) + "\n")
