"""How a checked training runs: in a folder that all processes share, and on from its last checkpoint."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .console import show, step, warn
from .options import flag
from .staging import STATE_FILE, partial_folder, staged_folder
from .train_checkpoints import remove_incomplete, step_of
from .training_job import TrainingJob, checkpoint_folder


def carry_out(job: TrainingJob, work: Callable[[Any, Path], Any], table: Callable[[Any], Any]) -> Path:
    """Do the work in a folder that all processes share, and show what came out.

    Args:
        job: What to do.
        work: Gets the job and the folder to fill; returns a `TrainingRun`.
        table: What to show of that.

    Returns:
        The folder that was made.
    """
    with shared_folder(job) as output:
        finished = work(job, output)
    if job.is_main:
        show(table(finished))
        for warning in finished.warnings:
            warn(warning)
        show(f"model:  {job.options.out}")
    return Path(str(job.options.out))


@contextmanager
def shared_folder(job: TrainingJob) -> Iterator[Path]:
    """The hidden folder's output; the main process makes it, and renames it when all are done."""
    out, state = Path(str(job.options.out)).expanduser(), job.arguments.distributed_state
    wait = (lambda: None) if state is None else state.wait_for_everyone
    if not job.is_main:
        wait()
        yield partial_folder(out) / "output"
        wait()
        return
    check_unfinished(job)
    with staged_folder(out, job.settings) as staging:
        job.folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(job.folder, job.arguments)
        wait()
        yield staging.output
        wait()


def check_unfinished(job: TrainingJob) -> None:
    """Refuse to give up the work of an unfinished run that had other settings.

    Raises:
        ValueError: Names the settings, and what to do.
    """
    out, settings, options = Path(str(job.options.out)).expanduser(), job.settings, vars(job.options)
    folder = partial_folder(out)
    try:
        earlier = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    changed = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
    # What follows from the options, such as the examples from the seed, would only hide the cause.
    changed = [key for key in changed if key in options] or changed
    if changed and any(checkpoint_folder(out).glob("checkpoint-*")):
        names = [flag(key) if key in options else key for key in changed]
        values = [f"{earlier.get(key)!r:.80} then, {settings.get(key)!r:.80} now" for key in changed]
        shown = "; ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        raise ValueError(
            f"an unfinished run for '{out}' had other settings ({shown}); give its command again, choose "
            f"another --out, or remove '{folder}'"
        )


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
