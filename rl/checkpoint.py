"""Checkpoints of a policy in training: whole or not at all; going on from one is as if nothing had been."""

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

STATE_FILE = "policy_state.json"
NAME = re.compile(r"step-(\d+)")
PARTIAL = ".partial"
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""What reading a damaged file raises; PyTorch reads the optimizer's with ``weights_only``."""


@dataclass(kw_only=True)
class RunState:
    """Where a run stands, beside its weights and its optimizer.

    Attributes:
        step: Rollout steps done.
        position: Prompts taken from the stream.
        updates: Optimizer steps done.
        skipped: Steps without an update because nothing could be learned.
        rehearsed: Rehearsal samples taken.
        failures: Rewards that failed, by name and kind.
        method: What the method remembers.
    """

    step: int = 0
    position: int = 0
    updates: int = 0
    skipped: int = 0
    rehearsed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_table = name in ("failures", "method")
            is_sound = isinstance(value, dict) if is_table else type(value) is int and value >= 0
            if not is_sound:
                raise ValueError(f"{name}={value!r} cannot be of a run")


def save(folder: Path, accelerator: Accelerator, state: RunState, *, keep: int = 1) -> Path:
    """Write a checkpoint, unless this step has one; every process calls it.

    accelerate keeps the optimizer's state in PyTorch's own format, and under FSDP2 the weights too, which it
    reads back with ``weights_only``; other weights are safetensors. DeepSpeed reads its files, and those
    alone, without ``weights_only``.

    Args:
        folder: Of all checkpoints of the run.
        accelerator: Holds the policy and its optimizer.
        state: The rest.
        keep: Newest checkpoints that stay.

    Returns:
        Its folder, ``step-N``.
    """
    target = folder / f"step-{state.step}"
    if target.is_dir():
        return target
    partial = folder / f"{target.name}{PARTIAL}"
    if accelerator.is_main_process:
        for left in folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _silent_about_tied_weights():
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        partial.replace(target)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Finished ones, the last first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def load(folder: Path, accelerator: Accelerator) -> RunState | None:
    """Go back to the last checkpoint; every process calls it, after `Accelerator.prepare`.

    Returns:
        The state, or ``None`` if there is no checkpoint.

    Raises:
        ValueError: The last checkpoint is damaged, or of another policy. It is not passed over in silence,
            because the steps since the one before would be lost.
    """
    found = checkpoints(folder)
    if not found:
        return None
    last = found[0]
    try:
        state = RunState(**json.loads((last / STATE_FILE).read_text(encoding="utf-8")))
        if last.name != f"step-{state.step}":
            raise ValueError(f"it is of step {state.step}")
        accelerator.load_state(str(last))
    except UNREADABLE as error:
        raise ValueError(
            f"checkpoint '{last}' cannot be read ({str(error)[:200]}); it is damaged or of another policy: "
            "remove this folder to go on from the one before, or from the beginning"
        ) from error
    return state


@contextmanager
def _silent_about_tied_weights() -> Iterator[None]:
    """Tied weights are saved once, and accelerate warns of it each time."""
    logger = logging.getLogger("accelerate.utils.other")

    def keep(record: logging.LogRecord) -> bool:
        return "Removed shared tensor" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
