"""What a finished training leaves behind for people and programs: run.json, curve, picture, model card."""

from dataclasses import asdict, dataclass
from pathlib import Path

from .slimming_curve import PICTURE_FILE, CurvePoint, SlimmingCurve, write_curve
from .train_prepare import TrainJob
from .training_record import ModelCard, TrainingRun, made_by, write_model_card, write_run_file

ADVICE = {"random": "; --center-routers balances them", "learned": "; a larger --load-balance balances them"}
EXPERT_TAGS = ("mixture-of-experts", "smoe-dropout", "self-slimmable")
SHOWN_LAYERS = 3
"""Layers named in a warning."""


@dataclass(frozen=True, kw_only=True)
class TrainRun(TrainingRun):
    """A finished `moekit train`."""

    job: TrainJob
    curve: SlimmingCurve
    form_metrics: dict[str, float]
    """Quality of a form that is not exactly the model that was trained."""


def find_training_warnings(job: TrainJob, curve: SlimmingCurve) -> tuple[str, ...]:
    """What a reader must know before using the result."""
    found = []
    for point in curve.points:
        if dead := point.dead_experts:
            shown = "; ".join(
                f"{experts} of layer {name!r}" for name, experts in list(dead.items())[:SHOWN_LAYERS]
            )
            more = f" and {len(dead) - SHOWN_LAYERS} more layers" if len(dead) > SHOWN_LAYERS else ""
            found.append(
                f"with {point.active_experts} active experts no held-out token reached the experts {shown}"
                f"{more}{ADVICE.get(job.router, '')}"
            )
    if job.schedule is not None and job.form == "dense" and job.schedule.k_end < job.schedule.num_experts:
        found.append(
            f"the dense form computes all {job.schedule.num_experts} experts, and the training ended at "
            f"{job.schedule.k_end}"
        )
    return tuple(found)


def write_training_records(run: TrainRun, folder: Path) -> None:
    """Write everything beside the model."""
    job = run.job
    write_curve(run.curve, folder)
    training = {
        "form": job.form,
        "schedule": None if job.schedule is None else asdict(job.schedule),
    }
    metrics = {
        "curve": run.curve.to_dict(),
        "expert_load": {str(point.active_experts): point.load for point in run.curve.points if point.load},
        **({f"{job.form}_form": run.form_metrics} if run.form_metrics else {}),
    }
    write_run_file(run, folder, training=training, metrics=metrics)
    write_model_card(run, folder, _card(run))


def _card(run: TrainRun) -> ModelCard:
    job = run.job
    return ModelCard(
        tags=("moekit", *(() if job.schedule is None else EXPERT_TAGS)),
        title=_title(job),
        summary=_summary(run),
        numbers=_curve_lines(run.curve),
        picture=f"![self-slimming curve]({PICTURE_FILE})" if len(run.curve.points) > 1 else "",
        needs_moekit=job.form == "moekit",
        after_loading=_slimmer(run),
    )


def _title(job: TrainJob) -> str:
    return "dense" if job.schedule is None else f"self-slimmable, {job.schedule.num_experts} experts"


def _summary(run: TrainRun) -> str:
    job = run.job
    begun = {
        "scratch": "from scratch",
        "carve": "from a pretrained model whose FFNs were cut into experts",
        "copy": "from a pretrained model whose FFNs were copied to experts",
        "continue": "from a model that had its experts already",
    }[job.start]
    made = f"{made_by(run)}: trained {begun} for {run.steps} steps"
    if job.schedule is None:
        return f"{made}, without experts."
    ends = f"{job.schedule.k_start} to {job.schedule.k_end} of {job.schedule.num_experts}"
    return (
        f"{made} with SMoE-Dropout ({job.router} router, schedule {job.schedule.name}, {ends} "
        f"experts active; form: {job.form})."
    )


def _slimmer(run: TrainRun) -> str:
    schedule = run.job.schedule
    if schedule is None or run.job.form != "moekit":
        return ""
    half = max(1, schedule.num_experts // 2)
    return f"\nmoekit.moe.set_active_experts(model, {half})  # any number from 1 to {schedule.num_experts}"


def _curve_lines(curve: SlimmingCurve) -> str:
    return "\n".join(_curve_line(point, curve) for point in curve.points)


def _curve_line(point: CurvePoint, curve: SlimmingCurve) -> str:
    name = "dense" if point.active_experts is None else f"{point.active_experts} active experts"
    quality = (
        f"accuracy {point.accuracy:.1%}" if point.perplexity is None else f"perplexity {point.perplexity:.4g}"
    )
    return f"- {name}: {quality}, loss {point.loss:.4f}, {point.speed:,.0f} {curve.unit}/s"
