"""Checkpoints of a policy in training: whole or not at all, and the run that goes on equals one that never stopped."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

STATE_FILE = "policy_state.json"
NAME = re.compile(r"step-(\d+)")
PARTIAL = ".partial"


@dataclass(kw_only=True)
class RunState:
    """Where a run stands, beside its weights and its optimizer.

    Attributes:
        step: Rollout steps done.
        position: Prompts taken from the stream.
        updates: Optimizer steps done.
        skipped: Steps without an update because all rewards were equal.
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


def save(folder: Path, accelerator: Accelerator, state: RunState, *, keep: int = 1) -> Path:
    """Write a checkpoint; every process calls it.

    accelerate keeps the optimizer's state in PyTorch's own format, which it reads back with
    ``weights_only``; the weights are safetensors.

    Args:
        folder: Of all checkpoints of the run.
        accelerator: Holds the policy and its optimizer.
        state: The rest.
        keep: Newest checkpoints that stay.

    Returns:
        Its folder, ``step-N``.
    """
    target = folder / f"step-{state.step}"
    partial = folder / f"{target.name}{PARTIAL}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
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
        ValueError: The checkpoint is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    last = found[0]
    try:
        state = RunState(**json.loads((last / STATE_FILE).read_text(encoding="utf-8")))
        accelerator.load_state(str(last))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint '{last}' cannot be read ({str(error)[:200]}); remove this folder to go on from the one "
            "before, or from the beginning"
        ) from error
    return state


def check_finite(model: torch.nn.Module) -> None:
    """Refuse to save weights that hold NaN or infinity.

    Raises:
        FloatingPointError: Names the first such weight.
    """
    for name, parameter in model.named_parameters():
        local: Any = parameter
        tensor = local.to_local() if hasattr(local, "to_local") else parameter
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float64)):
            raise FloatingPointError(f"the weight {name} holds NaN or infinity")
