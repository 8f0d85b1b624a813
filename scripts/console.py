"""What the commands show in the terminal."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 100
"""Of output that goes to no terminal, characters."""


_silent: list[bool] = []


def silence() -> None:
    """Let this process show nothing from now on but errors; another one speaks for it."""
    _silent.append(True)


def is_interactive() -> bool:
    """Whether progress bars have someone to look at them."""
    return not _silent and sys.stderr.isatty()


def step(text: str) -> None:
    """Say on standard error what begins now."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


def quiet_deepspeed() -> None:
    """Keep DeepSpeed, where it is installed, from saying on standard output that it found no accelerator."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)


def warn(text: str) -> None:
    """Say on standard error what the user should know."""
    if not _silent:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def show(*parts: Any) -> None:
    """Print texts and tables on standard output."""
    if _silent:
        return
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str | None = None
) -> Table:
    """A table whose first column is text and whose others are numbers, at the right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    made.caption, made.caption_justify, made.caption_style = caption, "left", ""
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def megabytes(num_bytes: int) -> str:
    """Bytes as people read them: 1.6 GB, 16.6 MB, 12.3 kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"


def millions(count: int) -> str:
    """Parameters as people read them: 30.5 B, 8.3 M, 12.3 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return str(count)
