"""Rows of a run's metrics on the disk, one JSON object a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class History:
    """Appends rows to a file that a killed run can go on with.

    Args:
        path: Of the file; its folder must exist when a row comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; NaN and infinity become null."""
        text = json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; a last line that a kill has cut is left out.

        Raises:
            ValueError: A line before the last is damaged.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"line {number} of '{self.path}' is damaged") from error
        return rows

    def truncate(self, step: int) -> None:
        """Drop the rows of later steps, which a run that goes on will write again."""
        rows = [row for row in self.read() if row["step"] <= step]
        if not rows and not self.path.is_file():
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, self.path)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
