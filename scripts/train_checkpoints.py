"""Which of Trainer's checkpoints a run can go on from: those that are whole."""

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .console import warn
from .train_arguments import asked_sharding
from .training_job import TrainingJob


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps in its name."""
    return int(checkpoint.name.rpartition("-")[2])


def whole_checkpoints(job: TrainingJob) -> list[Path]:
    """Checkpoints that can be gone on from, the last first."""
    found = [path for path in job.folder.glob("checkpoint-*") if fault_of(path, job) is None]
    return sorted(found, key=step_of, reverse=True)


def remove_incomplete(job: TrainingJob) -> None:
    """Remove what a killed run was writing, or a failing disk spoilt, and say so."""
    for path in sorted(job.folder.glob("checkpoint-*")):
        if (fault := fault_of(path, job)) is not None:
            warn(f"{path.name} is not used and removed: {fault}")
            shutil.rmtree(path)


def fault_of(checkpoint: Path, job: TrainingJob) -> str | None:
    """Why a checkpoint would not give the weights of an uninterrupted run; ``None`` where it would.

    Trainer itself goes on without an optimizer or a schedule that is missing, to other weights.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or damaged"
    if state.get("global_step") != step_of(checkpoint):
        return f"{TRAINER_STATE_NAME} is of another step"
    world = job.arguments.world_size
    pickled = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    is_divided = asked_sharding() is not None  # into folders of parts, which accelerate checks itself
    if not is_divided:
        pickled += [OPTIMIZER_NAME, SCHEDULER_NAME]
    for name in pickled:
        # What torch.save writes is a zip, whose list of contents stands at its end.
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or cut off"
    if is_divided:
        return None
    if (lost := job.lost_file(checkpoint)) is not None:
        return f"{lost} is missing"
    return _weights_fault(checkpoint)


def _weights_fault(checkpoint: Path) -> str | None:
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names.union(path.name for path in checkpoint.glob("*.safetensors"))):
            with safe_open(checkpoint / name, framework="pt"):  # which compares the header with the size
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"the weights cannot be read ({error})"
    return None
