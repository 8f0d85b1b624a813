"""`moekit compress`: from a checkpoint to a smaller one, checked, with a report of what was lost."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compress.apply import apply_plan
from ..compress.plan import CompressionPlan
from ..compress.report import write_report
from ..moe.checkpoint import save_checkpoint
from ..moe.data import TokenBlocks
from ..moe.discovery import expert_layers
from ..moe.footprint import Footprint, footprint
from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from ..moe.statistics_file import FILE_NAME
from .calibrate import Calibration, calibrate
from .checkpoint_files import tensor_bytes
from .collapse_store import add_run
from .console import is_interactive, show, step, warn
from .descent import Reached
from .heal import heal
from .healing import Healing
from .load import load_model
from .measure import Measurements, measure
from .options import CompressOptions
from .planning import make_plan, needs_samples, plan_in_sequence, try_planner
from .prediction import predict_footprint
from .prepare import PLAN_FILE, Job, is_sequential, plan_path, prepare
from .quantised import told
from .record import (
    STATISTICS_FOLDER,
    Run,
    find_warnings,
    report_content,
    size_warnings,
    summary_table,
    versions,
    write_model_card,
    write_run_file,
)
from .shared_folder import shared_folder
from .staging import Staging
from .stream import compress_streamed
from .until_collapse import descend, run_kind
from .verify import verify_reload

CARRIED_OVER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "*.tiktoken",
    "*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files of the original that belong to the result unchanged."""


def run(options: CompressOptions, *, replace: bool = False) -> Path | None:
    """Compress a checkpoint.

    Args:
        options: What to do.
        replace: The output folder may hold something, which goes once the new result is whole.

    Returns:
        The folder that was made; None when only a plan was.

    Raises:
        ValueError: Something that was asked for cannot be, in almost all cases before any work.
        DiskFullError: There is no room for the result.
    """
    job = prepare(options, replace=replace)
    options = job.options
    torch.manual_seed(options.seed)
    if options.plan_only:
        _only_plan(job)
        return None
    assert options.out is not None
    with shared_folder(
        options.out,
        _fingerprint(job),
        is_main=job.processes.is_main,
        wait=job.processes.wait,
        replace=replace,
    ) as staging:
        finished = _stream(job, staging) if options.stream else _compress(job, staging)
    if finished is None:
        return options.out
    show(summary_table(finished))
    for warning in finished.warnings:
        warn(warning)
    if options.report:
        show(f"report: {options.out / 'report.html'}")
    show(f"model:  {options.out}")
    if finished.reached is not None and options.collapse_store is not None:
        kind = run_kind(job, finished.plan.model.fingerprint)
        add_run(options.collapse_store, kind, options.model, finished.reached.trail.points)
    return options.out


def _fingerprint(job: Job) -> dict[str, Any]:
    """What the work depends on: the same again means that it may be gone on with."""
    texts = {"calibration": job.texts.calibration.fingerprint, "held out": job.texts.held_out.fingerprint}
    plan = None if job.plan is None else job.plan.hash
    settings = {key: value for key, value in vars(job.options).items() if key not in ("out", "debug")}
    # What flows between layers lies in files of each process.
    streamed = {"processes": job.processes.count} if job.options.stream else {}
    return {
        **settings,
        **streamed,
        "model files": job.source.fingerprint,
        "texts": texts,
        "plan": plan,
        "versions": versions(),
    }


def _only_plan(job: Job) -> None:
    """Make a plan, show it, and save it if a place was named."""
    model, layers = _load(job)
    if is_sequential(job.options):
        plan = plan_in_sequence(job, model, layers)[0]
    else:
        with tempfile.TemporaryDirectory() as folder:
            calibration, is_main = _calibrate(job, model, Path(folder)), job.processes.is_main
            plan = make_plan(job, model, layers, calibration, Path(folder)) if is_main else None
    if plan is None or not job.processes.is_main:
        return
    show(plan.summary())
    out = job.options.out
    if out is None:
        show(plan.to_json())
        return
    path = plan.save(plan_path(out))
    show(f"plan: {path} (edit it if you like, then give it to --plan)")


def _load(job: Job) -> tuple[PreTrainedModel, list[ExpertLayer]]:
    """The model, once its routers were asked whether they can do what is planned."""
    step(f"Loading {job.source.name}")
    model = load_model(job.source, dtype=job.options.dtype, device=job.options.device)
    if dequantised := told(job.source.config, model.dtype):
        step(f"{job.source.name}{dequantised}")
    layers = expert_layers(model)
    if job.plan is not None:
        job.plan.validate_against(layers)
    else:
        try_planner(job.options, layers)
    return model, layers


def _calibrate(job: Job, model: PreTrainedModel, folder: Path) -> Calibration:
    blocks = job.texts.calibration
    step(f"Recording the routing of {blocks.num_tokens:,} tokens")
    return calibrate(
        model,
        blocks,
        folder,
        batch_size=job.options.batch_size,
        progress=is_interactive(),
        sample_inputs=needs_samples(job),
        processes=job.processes,
    )


@dataclass(kw_only=True)
class _Made:
    """A compressed model in memory."""

    model: Any
    plan: CompressionPlan
    statistics: RoutingStatistics
    after: Footprint
    """As planned, before healing and writing."""
    merging: dict[str, dict[str, Any]]
    one_shot: Measurements | None = None
    healing: Healing | None = None
    reached: Reached | None = None


def _make(job: Job, model: PreTrainedModel, layers: list[ExpertLayer], staging: Staging) -> _Made | None:
    """Plan, apply and heal, in whatever way was asked for; None in processes that have done their part."""
    options, is_main = job.options, job.processes.is_main
    if options.until_collapse_risk is not None:
        model, reached = descend(job, model, staging)
        after = footprint(model, expert_layers(model))
        staging.reserve(after.total_bytes)
        return _Made(
            model=model,
            plan=reached.plan,
            statistics=reached.statistics,
            after=after,
            merging=reached.trail.merging,
            healing=reached.trail.healing,
            reached=reached,
        )
    one_shot = None
    if is_sequential(options):
        plan, statistics, merging = plan_in_sequence(job, model, layers)
        after = footprint(model, layers)
        staging.reserve(after.total_bytes)
    else:
        calibration = _calibrate(job, model, staging.work)
        statistics = calibration.statistics
        if not is_main and options.heal == "none":
            return None
        plan = _agreed_plan(job, model, layers, calibration, staging.work)
        after = predict_footprint(model, plan)
        staging.reserve(after.total_bytes)
        step(f"From {sum(p.num_experts for p in plan.layers)} experts to {plan.actual_experts}")
        if options.prune_rows and options.report and is_main:
            one_shot = _one_shot(job, model, plan, calibration)
        merging = _apply(model, _with_all_rows(job, plan), calibration)
        del calibration
    made = _Made(model=model, plan=plan, statistics=statistics, after=after, merging=merging)
    if options.heal != "none":
        if one_shot is None and options.report and is_main:
            one_shot = _measure(job, model)
        made.one_shot = one_shot
        step(f"Healing: {options.heal}, on {job.texts.calibration.num_tokens:,} tokens")
        made.healing = heal(job, model, staging.work / "healing", sparse_rows=_rows_to_keep(job, plan))
    return made if is_main else None


def _apply(
    model: PreTrainedModel, plan: CompressionPlan, calibration: Calibration
) -> dict[str, dict[str, Any]]:
    return apply_plan(
        model,
        plan,
        statistics=calibration.statistics,
        samples=calibration.samples,
        progress=is_interactive(),
    )


def _one_shot(
    job: Job, original: PreTrainedModel, plan: CompressionPlan, calibration: Calibration
) -> Measurements:
    """What the plan gives without healing, where healing begins with another model."""
    model = load_model(job.source, dtype=job.options.dtype, device=job.options.device)
    _apply(model, plan, calibration)
    return _measure(job, model, original)


def _with_all_rows(job: Job, plan: CompressionPlan) -> CompressionPlan:
    """What healing begins with, if it prunes rows."""
    if not job.options.prune_rows or plan.low_rank is None:
        return plan
    return replace(plan, low_rank=replace(plan.low_rank, sparse_rows=1.0))


def _rows_to_keep(job: Job, plan: CompressionPlan) -> float | None:
    return plan.low_rank.sparse_rows if job.options.prune_rows and plan.low_rank is not None else None


def _compress(job: Job, staging: Staging) -> Run | None:
    """Do the work within the hidden folder; None in other processes than the main one."""
    options, output = job.options, staging.output
    model, layers = _load(job)
    before = footprint(model, layers)
    made = _make(job, model, layers, staging)
    del model, layers
    if made is None:
        return None
    model = made.model
    step("Writing the checkpoint and reading it back")
    form = save_checkpoint(model, output, max_shard_size=options.max_shard_size)
    carry_over(job.source.folder, output)
    made.plan.save(output / PLAN_FILE)
    made.statistics.save(output / STATISTICS_FOLDER / FILE_NAME)
    reloaded, difference = verify_reload(model, output, job.texts.held_out)
    made.model = None
    del model  # room for the original
    source_bytes, written = tensor_bytes(job.source.folder), tensor_bytes(output)
    sizes = {"source": source_bytes, "loaded": before.total_bytes, "written": written}
    finished = Run(
        options=options,
        model_class=type(reloaded).__name__,
        plan=made.plan,
        statistics=made.statistics,
        form=form,
        before=before,
        after=made.after,
        source_bytes=source_bytes,
        written_bytes=written,
        merging=made.merging,
        reload_difference=difference,
        measured=_measure(job, reloaded) if options.report else None,
        one_shot=made.one_shot,
        healing=made.healing,
        reached=made.reached,
        data=job.data,
        warnings=find_warnings(made.plan, made.statistics, foretold=made.after.total_bytes, written=written)
        + size_warnings(**sizes, dtypes=_dtypes(job, reloaded.dtype)),
    )
    _write_records(finished, output)
    return finished


def _agreed_plan(
    job: Job, model: PreTrainedModel, layers: list[ExpertLayer], calibration: Calibration, folder: Path
) -> CompressionPlan:
    """What the main process plans, in all that go on after it."""
    if job.processes.count == 1 or job.options.heal == "none":
        return make_plan(job, model, layers, calibration, folder)
    is_main = job.processes.is_main
    mine = make_plan(job, model, layers, calibration, folder).to_json() if is_main else None
    return CompressionPlan.from_json(job.processes.same(mine))


def _stream(job: Job, staging: Staging) -> Run | None:
    """Do the work one decoder layer at a time; None in other processes than the main one."""
    options, output = job.options, staging.output
    source_bytes = tensor_bytes(job.source.folder)
    done = compress_streamed(job, staging)
    if done is None:
        return None
    carry_over(job.source.folder, output)
    written = tensor_bytes(output)
    sizes = {"source": source_bytes, "loaded": done.before.total_bytes, "written": written}
    finished = Run(
        options=options,
        model_class=done.model_class,
        plan=done.plan,
        statistics=done.statistics,
        form=done.form,
        before=done.before,
        after=done.after,
        source_bytes=source_bytes,
        written_bytes=written,
        merging=done.merging,
        reload_difference=done.reload_difference,
        measured=done.measured,
        one_shot=None,
        healing=None,
        reached=None,
        data=job.data,
        warnings=find_warnings(done.plan, done.statistics, foretold=done.after.total_bytes, written=written)
        + size_warnings(**sizes, dtypes=_dtypes(job, done.dtype)),
    )
    _write_records(finished, output)
    return finished


def _dtypes(job: Job, result: torch.dtype) -> tuple[str, str]:
    """Names of the original's type, as far as its config says, and of the result's."""
    stored = job.source.config.dtype or result
    return str(stored).removeprefix("torch."), str(result).removeprefix("torch.")


def _write_records(finished: Run, output: Path) -> None:
    if finished.options.report:
        write_report(output, report_content(finished))
    write_run_file(finished, output)
    write_model_card(finished, output)


def _measure(job: Job, compressed: PreTrainedModel, original: PreTrainedModel | None = None) -> Measurements:
    """Compare with the original, loaded once more unless it is given."""
    blocks: TokenBlocks = job.texts.held_out
    step(f"Comparing with the original on {blocks.num_tokens:,} held-out tokens")
    options = job.options
    return measure(
        original or load_model(job.source, dtype=options.dtype, device=options.device),
        compressed,
        job.tokenizer,
        blocks,
        batch_size=options.batch_size,
        answer_marker=options.answer_marker.replace("\\n", "\n"),
        progress=is_interactive(),
    )


def carry_over(source: Path, output: Path) -> None:
    """Copy the tokenizer and what else stays as it was."""
    for path in sorted({path for pattern in CARRIED_OVER for path in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, output / path.name)
