"""What a finished distillation leaves behind: run.json, picture, model card, table."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..moe.checkpoint import METHOD
from .checkpoint_files import content_fingerprint
from .console import millions, table
from .distill_figure import PICTURE_FILE, draw_history
from .distill_measure import Measures
from .distill_prepare import DistillJob
from .training_record import (
    ModelCard,
    TrainingRun,
    made_by,
    model_name,
    write_model_card,
    write_run_file,
)

SHOWN = {
    "cross_entropy": ("cross-entropy, nats", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "kl": ("KL to the teacher, nats", "{:.4f}"),
    "top1_agreement": ("same answer as the teacher", "{:.1%}"),
}
"""Rows of the table, and how their numbers are written."""
LARGEST = 700
"""The exponential of more is no number."""


@dataclass(frozen=True, kw_only=True)
class DistillRun(TrainingRun):
    """A finished distillation."""

    job: DistillJob
    before: Measures | None
    """Held-out measures of the student as it came; see `Agreement`."""
    after: Measures
    parameters: int
    trained_parameters: int

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Of the table: what, before, after, teacher."""
        before, after = self.before or {}, self.after
        teacher = {key: after[f"teacher_{key}"] for key in SHOWN if f"teacher_{key}" in after}
        sides = [before, after, teacher]
        found = []
        for name, (label, form) in SHOWN.items():
            values = [side.get(name) for side in sides]
            if any(value is not None for value in values):
                found.append((label, *("" if value is None else form.format(value) for value in values)))
        if self.job.task == "causal-lm":
            losses = [side.get("cross_entropy") for side in sides]
            found.insert(1, ("perplexity", *(_perplexity(loss) for loss in losses)))
        return found


def _perplexity(loss: float | None) -> str:
    return "" if loss is None or loss > LARGEST else f"{math.exp(loss):.4g}"


def summary_table(run: DistillRun) -> Table:
    """What came out, for the terminal."""
    first = "before" if run.job.start != "scratch" else ""
    return table("On held-out examples", ("", first, "after", "teacher"), run.rows)


def write_distill_records(run: DistillRun, folder: Path) -> None:
    """Write everything beside the model."""
    job, recipe, cache = run.job, run.job.recipe, run.job.cache
    training = {
        "teacher": job.options.teacher,
        "teacher_fingerprint": content_fingerprint(job.teacher.source.folder),
        "loss": job.options.loss,
        "heads": recipe.heads,
        "loss_arguments": recipe.arguments,
        "weight": recipe.weight_for(_num_classes(run)),
        "label_weight": recipe.label_weight,
        "aligned_at": job.options.align_at if job.options.align_gradients else None,
        "cache": None if cache is None else {"kind": cache.kind, "fingerprint": cache.digest},
        "parameters": run.parameters,
        "trained_parameters": run.trained_parameters,
    }
    metrics = {"before": run.before, "after": run.after}
    write_run_file(run, folder, training=training, metrics=metrics)
    has_picture = draw_history(run.history, folder / PICTURE_FILE)
    write_model_card(run, folder, _card(run, has_picture=has_picture))


def _num_classes(run: DistillRun) -> int:
    job = run.job
    if job.teacher.num_columns is not None:
        return job.teacher.num_columns
    return len(job.labels) or job.config.get_text_config().vocab_size


def _card(run: DistillRun, *, has_picture: bool) -> ModelCard:
    job, options = run.job, run.job.options
    heads = "a second head, since dropped" if job.recipe.heads == "dual" else "its own head"
    trained = " (routers only)" if options.train_only == "routers" else ""
    summary = (
        f"{made_by(run)}: distilled from `{options.teacher}` for {run.steps} steps, {options.loss} on {heads}"
        f"{trained}. {millions(run.parameters)} parameters."
    )
    lines = ["| held-out | before | after | teacher |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in run.rows]
    quantised: Any = getattr(job.config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    return ModelCard(
        tags=("moekit", "distillation"),
        title=f"distilled from {model_name(options.teacher or '')}",
        summary=summary,
        numbers="\n".join(lines),
        picture=f"![loss over steps]({PICTURE_FILE})" if has_picture else "",
        needs_moekit=method == METHOD,
    )
