"""`moekit distill`: from a teacher and a student to a trained student, and how near it has come."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PrinterCallback

from ..distill import DistillTrainer, DualHeadStudent, StudentInTraining, train_only_routers
from ..distill.teachers import Teacher
from ..moe.checkpoint import save_checkpoint
from .console import is_interactive
from .distill_checks import head_spec, make_alignment
from .distill_measure import Agreement, Measures, agreement
from .distill_options import DistillOptions
from .distill_prepare import DistillJob, prepare_distillation
from .distill_record import DistillRun, summary_table, write_distill_records
from .distill_teacher import open_cache
from .slimming_curve import summarise
from .train_arguments import check_sharding
from .train_checkpoints import whole_checkpoints
from .train_data import row_metrics
from .train_export import save_beside, save_sharded, verify_saved
from .train_model import build_model
from .train_progress import TrainingLines
from .training_run import carry_out, fit, say

BEFORE_FILE = "before.json"


def run(options: DistillOptions) -> Path:
    """Train, or go on with the training that the same options began.

    Args:
        options: What to do.

    Returns:
        The folder that was made.

    Raises:
        ValueError: Something that was asked for cannot be, in almost all cases before any work.
        DiskFullError: There is no room for the result.
    """
    return carry_out(prepare_distillation(options), _distill, summary_table)


def _distill(job: DistillJob, output: Path) -> DistillRun:
    """Do the work; every process comes through here."""
    checkpoints = whole_checkpoints(job)
    use_cache = getattr(job.config, "use_cache", None)
    trainer = _trainer(job)
    before = _before(job, trainer, is_resumed=bool(checkpoints))
    fit(job, trainer, checkpoints)
    after = _held_out(job, trainer, "after")
    if use_cache is not None:
        trainer.student.config.use_cache = use_cache  # which Trainer turns off
    history, steps = list(trainer.state.log_history), trainer.state.global_step
    model_class = _export(job, trainer, output)
    finished = DistillRun(
        job=job,
        model_class=model_class,
        history=history,
        steps=steps,
        warnings=(),
        before=before,
        after=after,
        trained_parameters=sum(p.numel() for p in trainer.student.plain.parameters() if p.requires_grad),
        parameters=trainer.student.plain.num_parameters(),
    )
    if job.is_main:
        write_distill_records(finished, output)
    return finished


def _teacher(job: DistillJob) -> Teacher:
    """The model in memory, or the cache of what it says."""
    device = job.arguments.device
    if job.cache is None:
        say(job, f"Loading the teacher {job.teacher.source.name}")
        return job.teacher.in_memory(device)
    assert job.options.cache is not None
    folder = job.options.cache.expanduser()
    say(job, f"Reading what the teacher {job.teacher.source.name} says from {folder}")
    return open_cache(folder, job.cache, job.teacher, job.train_rows, job.collate, job.arguments)


def _student(job: DistillJob) -> StudentInTraining:
    options = job.options
    say(job, f"{'Building' if job.start == 'scratch' else 'Loading'} the student {job.source.name}")
    model = build_model(job.source, job.config, job.task, start=job.start, seed=options.seed)
    if options.train_only == "routers":
        train_only_routers(model)
    student: Any = model
    if job.recipe.heads == "dual":
        student = DualHeadStudent(model, head_spec(options), num_teacher_classes=job.teacher.num_columns)
    return StudentInTraining(
        student, job.recipe, alignment=make_alignment(options), num_columns=job.teacher.num_columns
    )


def _trainer(job: DistillJob) -> Any:
    """With student and teacher; nothing else holds the teacher, so that the trainer can drop it."""
    teacher = _teacher(job)
    say(job, f"Distilling on {len(job.train_rows):,} examples, {job.arguments.world_size} process(es)")
    student, is_cached = _student(job), job.cache is not None
    trainer: Any = DistillTrainer(
        model=student,
        args=job.arguments,
        train_dataset=job.train_rows.without_teacher() if is_cached else job.train_rows,
        eval_dataset=job.examples.held_out,
        data_collator=job.collate,
        processing_class=job.processor,
        # Of language models the trainer gives the same sums itself, without logits.
        preprocess_logits_for_metrics=None if job.task == "causal-lm" else partial(row_metrics, shift=False),
        compute_metrics=lambda found: summarise(found.predictions),
        callbacks=[TrainingLines()],
        teacher=teacher,
        stop_epoch=job.options.stop_epoch,
    )
    trainer.remove_callback(PrinterCallback)
    check_sharding(trainer.accelerator.distributed_type)
    return trainer


def _before(job: DistillJob, trainer: Any, *, is_resumed: bool) -> Measures | None:
    """The student as it came; ``None`` where it has learned nothing yet, or is divided only in training."""
    if job.start == "scratch" or trainer.is_divided:
        return None
    path = job.folder.parent / BEFORE_FILE
    if is_resumed and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if is_resumed:
        return None
    found = _held_out(job, trainer, "before")
    if job.is_main:
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _held_out(job: DistillJob, trainer: Any, when: str) -> Measures:
    """The student on the held-out examples, all processes together, and how near it is to the teacher."""
    found = {}
    # A cache is there because the teacher is large: before the training it is not loaded for this.
    is_near_measured = _compares(job, trainer) and (when == "after" or job.cache is None)
    if not is_near_measured or job.arguments.world_size > 1:
        evaluated = trainer.evaluate(metric_key_prefix=f"eval_{when}")
        found = {name: evaluated[f"eval_{when}_{name}"] for name in summarise([[0.0, 0.0, 0.0]])}
    if is_near_measured and job.is_main:
        return found | asdict(_agreement(job, trainer))
    return found


def _compares(job: DistillJob, trainer: Any) -> bool:
    is_alike = job.task != "causal-lm" or job.teacher.is_same_reader
    return job.options.compare and is_alike and not trainer.is_divided


def _export(job: DistillJob, trainer: Any, output: Path) -> str:
    """Write the plain model; every process has to call it.

    Raises:
        VerificationError: What was written is not what was in memory.
    """
    if trainer.is_divided:
        save_sharded(trainer, output)
        save_beside(job, output)
        return type(trainer.student.plain).__name__
    model = trainer.student.plain
    if job.is_main:
        save_checkpoint(model, output, max_shard_size=job.options.max_shard_size)
        verify_saved(model, output)
        save_beside(job, output)
    return type(model).__name__


def _agreement(job: DistillJob, trainer: Any) -> Agreement:
    model: Any = getattr(trainer.teacher, "model", None)
    if model is None:
        say(job, f"Loading the teacher {job.teacher.source.name} to compare with")
        model = job.teacher.load(job.arguments.device)
    batches = DataLoader(
        job.held_out_rows, batch_size=job.arguments.per_device_eval_batch_size, collate_fn=job.collate
    )
    return agreement(
        model,
        trainer.student.plain.to(job.arguments.device),
        batches,  # pyright: ignore[reportArgumentType]
        is_language_model=job.task == "causal-lm",
        num_columns=job.teacher.num_columns,
        shows_progress=is_interactive(),
    )
