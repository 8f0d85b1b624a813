"""Rows of a run on the disk, one JSON object a line."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class History:
    """Appends rows to a file that a killed run can go on with.

    Args:
        path: Of the file; made with its folder when a row comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, which has a ``step``; NaN and infinity become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; a last line that a kill has cut is left out.

        Raises:
            ValueError: A line before the last is damaged.
        """
        if not self.path.is_file():
            return []
        # Not splitlines: completions hold other characters that end lines.
        *lines, cut = self.path.read_bytes().split(b"\n")
        rows = [_row(line) for line in lines]
        if not cut and rows and rows[-1] is None:
            rows.pop()
        if None in rows:
            raise ValueError(
                f"line {rows.index(None) + 1} of '{self.path}' is damaged; "
                "remove the file, or the lines from there on"
            )
        return [row for row in rows if row is not None]

    def truncate(self, step: int) -> None:
        """Drop the rows of later steps, which a run that goes on will write again, and a cut last line."""
        if not self.path.is_file():
            return
        kept = [_line(row) for row in self.read() if row["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or ``None`` if it is none."""
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n"
