"""What a finished training leaves behind for people and programs: run.json, curve, picture, model card."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

from .options import command_line
from .record import FORMAT, RUN_FILE, short_name, versions
from .slimming_curve import PICTURE_FILE, CurvePoint, SlimmingCurve, write_curve
from .train_prepare import TrainJob

ADVICE = {"random": "; --center-routers balances them", "learned": "; a larger --load-balance balances them"}
SHOWN_LAYERS = 3
"""Layers named in a warning."""


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """A finished training."""

    job: TrainJob
    model_class: str
    curve: SlimmingCurve
    history: list[dict[str, Any]]
    """What Trainer logged."""
    steps: int
    form_metrics: dict[str, float]
    """Quality of a form that is not exactly the model that was trained."""
    warnings: tuple[str, ...]


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
    write_curve(run.curve, folder)
    _write_run_file(run, folder)
    _write_model_card(run, folder)


def _write_run_file(run: TrainRun, folder: Path) -> None:
    job, options = run.job, run.job.options
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    facts = {
        "format": FORMAT,
        "version": 1,
        "command": command_line("train", options),
        "config": config,
        "training": {
            "task": options.task,
            "start": job.start,
            "form": job.form,
            "model_class": run.model_class,
            "schedule": None if job.schedule is None else asdict(job.schedule),
            "steps": run.steps,
            "processes": job.arguments.world_size,
            "learning_rate": job.arguments.learning_rate,
            "labels": list(job.labels),
        },
        "versions": versions() | {"accelerate": version("accelerate")},
        "platform": platform.platform(),
        "seed": options.seed,
        "data": {
            "source": options.data,
            "fingerprint": job.examples.fingerprint,
            "examples": {"train": len(job.examples.train), "held_out": len(job.examples.held_out)},
        },
        "metrics": {
            "curve": run.curve.to_dict(),
            "expert_load": {
                str(point.active_experts): point.load for point in run.curve.points if point.load
            },
            **({f"{job.form}_form": run.form_metrics} if run.form_metrics else {}),
            "history": [_finite(record) for record in run.history],
        },
        "warnings": list(run.warnings),
    }
    text = json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False, default=str)
    (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON cannot hold."""
    return {
        key: None if isinstance(value, float) and not isfinite(value) else value
        for key, value in record.items()
    }


def _write_model_card(run: TrainRun, folder: Path) -> None:
    """Write `README.md` as the hub shows it."""
    job, options = run.job, run.job.options
    is_hub = job.start != "scratch" and not Path(options.model).exists()
    base = f"base_model: {options.model}\n" if is_hub else ""
    needs_moekit = job.form == "moekit"
    note = "import moekit.moe  # teaches transformers the moekit form\n" if needs_moekit else ""
    warnings = "".join(f"- {warning}\n" for warning in run.warnings)
    picture = f"![self-slimming curve]({PICTURE_FILE})" if len(run.curve.points) > 1 else ""
    card = f"""---
library_name: transformers
{base}tags: [moekit{"" if job.schedule is None else ", mixture-of-experts, smoe-dropout, self-slimmable"}]
---

# {short_name(options.model)}: {_title(job)}

{_summary(run)}

## Numbers

{_curve_lines(run.curve)}

{picture}

{f"## Warnings{chr(10)}{chr(10)}{warnings}" if warnings else ""}
## Load it

```python
{note}from transformers import {run.model_class}

model = {run.model_class}.from_pretrained("path/or/hub-id"){_slimmer(run)}
```

## How it was made

`{command_line("train", options)}`

`run.json` holds the settings and every number.
"""
    while "\n\n\n" in card:
        card = card.replace("\n\n\n", "\n\n")
    (folder / "README.md").write_text(card, encoding="utf-8")


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
    by = f"Made by moekit {versions()['moekit']} from `{job.options.model}`"
    made = f"{by}: trained {begun} for {run.steps} steps"
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
