"""What a run tells: its history, completions to be read, and rows for whoever listens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .history import History
from .rollout import RolloutGroup

SHOWN = 4
"""Completions of a step that are kept to be read."""


@dataclass(kw_only=True)
class RunLog:
    """Keeps the rows of a run in its folder; on processes other than the main one it does nothing.

    Attributes:
        folder: Of the run.
        steps: Of the run.
        logging_steps: Between rows that are shown, and completions that are kept.
        is_main: Whether this process writes.
        on_row: Told of every row that is shown.
    """

    folder: Path
    steps: int
    logging_steps: int
    is_main: bool
    on_row: Callable[[dict[str, Any]], None] | None = None

    @property
    def history(self) -> History:
        """Metrics of every step."""
        return History(self.folder / "history.jsonl")

    @property
    def completions(self) -> History:
        """Some completions of every logged step."""
        return History(self.folder / "completions.jsonl")

    def go_on_from(self, step: int | None) -> None:
        """Drop what was kept of later steps, which the run will do again.

        Args:
            step: The last that is done; ``None`` if the run begins.
        """
        if self.is_main:
            for kept in (self.history, self.completions):
                kept.truncate(-1 if step is None else step)

    def keep(self, step: int, group: RolloutGroup) -> None:
        """Keep some completions of a step, if it is logged."""
        if not self.is_main or step % self.logging_steps:
            return
        for rollout, reward in list(zip(group.rollouts, group.rewards.tolist(), strict=True))[:SHOWN]:
            self.completions.append(
                {"step": step, "prompt": group.prompt.text, "completion": rollout.text, "reward": reward}
            )

    def row(self, row: dict[str, Any]) -> None:
        """Keep a row, and show it if its step is logged or evaluated; the last step always is."""
        if not self.is_main:
            return
        self.history.append(row)
        is_logged = row["step"] % self.logging_steps == 0 or row["step"] == self.steps
        is_shown = is_logged or any(name.startswith("eval_") for name in row)
        if self.on_row is not None and is_shown:
            self.on_row(row)
