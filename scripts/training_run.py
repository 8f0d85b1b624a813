"""How a checked training runs: in a folder that all processes share, and on from its last checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .console import show, step, warn
from .shared_folder import check_unfinished, shared_folder
from .train_checkpoints import remove_incomplete, step_of
from .training_job import TrainingJob


def carry_out(job: TrainingJob, work: Callable[[Any, Path], Any], table: Callable[[Any], Any]) -> Path:
    """Do the work in a folder that all processes share, and show what came out.

    Args:
        job: What to do.
        work: Gets the job and the folder to fill; returns a `TrainingRun`.
        table: What to show of that.

    Returns:
        The folder that was made.
    """
    out, state = Path(str(job.options.out)).expanduser(), job.arguments.distributed_state
    if job.is_main:
        check_unfinished(out, job.settings, vars(job.options), f"{job.folder.name}/checkpoint-*")
    with shared_folder(
        out,
        job.settings,
        is_main=job.is_main,
        wait=(lambda: None) if state is None else state.wait_for_everyone,
        begin=partial(_begin, job),
    ) as staging:
        finished = work(job, staging.output)
    if job.is_main:
        show(table(finished))
        for warning in finished.warnings:
            warn(warning)
        show(f"model:  {job.options.out}")
    return Path(str(job.options.out))


def _begin(job: TrainingJob, work: Path) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_incomplete(job)


def say(job: TrainingJob, text: str) -> None:
    """Say what begins, once for all processes."""
    if job.is_main:
        step(text)


def fit(job: TrainingJob, trainer: Any, checkpoints: list[Path]) -> None:
    """Train to the end, from the last checkpoint if there is one.

    Args:
        job: What is trained.
        trainer: A `Trainer`, which has its state of the last step afterwards.
        checkpoints: What `whole_checkpoints` found, the last first.
    """
    finished = bool(checkpoints) and TrainerState.load_from_json(
        str(checkpoints[0] / TRAINER_STATE_NAME)
    ).global_step >= _total_steps(trainer)
    if finished and trainer.is_divided:
        # Trainer would take another step, and only its own loop can load what is sharded.
        checkpoints, finished = checkpoints[1:], False
    if not checkpoints:
        trainer.train()
        return
    last = str(checkpoints[0])
    say(job, f"Going on from step {step_of(checkpoints[0])}")
    if not finished:
        trainer.train(resume_from_checkpoint=last)
        return
    trainer._load_from_checkpoint(last)
    trainer.state = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))


def _total_steps(trainer: Any) -> int:
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
