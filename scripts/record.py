"""What a finished run leaves behind for people and programs: report, run.json, model card, the last table."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from ..compress.gain_map import GainMap
from ..compress.plan import CompressionPlan
from ..compress.protection import super_experts
from ..compress.report_content import (
    Comparison,
    DomainRow,
    HealingRow,
    LayerReport,
    ReportContent,
    verdict,
)
from ..compress.scores import NEEDS_NO_DATA
from ..moe.footprint import PARTS, Footprint
from ..moe.statistics import RoutingStatistics
from .console import megabytes, millions, table
from .descent import Reached, gain_map
from .healing import Healing
from .measure import Measurements
from .options import CompressOptions, command_line

MIN_TOKENS = 32
"""Experts that fewer calibration tokens chose are reported as judged on too few."""
SIZE_SHARE = 0.02
"""Difference between the original on disk and in memory that a reader of its size has to know of."""
STATISTICS_FOLDER = "calibration"
"""Of the routing statistics; beside the weights vLLM would read them as weights."""
RUN_FILE = "run.json"
FORMAT = "moekit.run"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished compression."""

    options: CompressOptions
    model_class: str
    plan: CompressionPlan
    statistics: RoutingStatistics
    form: str
    """Of the checkpoint as written: a plan that changes nothing needs no moekit form."""
    before: Footprint
    """Of the original as it was loaded, which is not as it was stored if `--dtype` changes it."""
    after: Footprint
    source_bytes: int
    """Of the tensors in the original's files."""
    written_bytes: int
    """Of the tensors in the result's files."""
    merging: dict[str, dict[str, Any]]
    """By layer, from `apply_plan`."""
    reload_difference: float
    """Largest relative difference of logits between the model in memory and the one read back."""
    measured: Measurements | None
    one_shot: Measurements | None
    """Of the compressed model before it was healed, if it was."""
    healing: Healing | None
    reached: Reached | None
    """Where cutting until the risk of a collapse has ended, if that was asked for."""
    data: str
    warnings: tuple[str, ...]

    @property
    def experts(self) -> tuple[int, int]:
        """Of all layers, before and after."""
        return sum(layer.num_experts for layer in self.plan.layers), self.plan.actual_experts


def short_name(model: str) -> str:
    """The last part of a folder or hub id."""
    return model.rstrip("/").rpartition("/")[2] or model


def versions() -> dict[str, str]:
    """Of everything that the result depends on."""
    names = ("moekit", "torch", "transformers", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def find_warnings(
    plan: CompressionPlan, statistics: RoutingStatistics, *, foretold: int, written: int
) -> tuple[str, ...]:
    """What a reader must know before trusting the result.

    Args:
        plan: What was done.
        statistics: What it rests on.
        foretold: Bytes of the tensors as predicted.
        written: Bytes of the tensors on disk.
    """
    found = list(plan.notes)
    if written != foretold:
        found.append(f"the tensors on disk take {written:,} bytes; {foretold:,} were foretold")
    few = sum(len(experts) for experts in statistics.coverage(MIN_TOKENS).values())
    reads_use = plan.method not in NEEDS_NO_DATA or plan.settings.get("grouping") in (
        "adaptive",
        "sensitivity",
    )
    if few and reads_use and any(not layer.is_identity for layer in plan.layers):
        total = sum(layer.num_experts for layer in statistics.layers.values())
        found.append(
            f"{few} of {total} experts were chosen by fewer than {MIN_TOKENS} calibration tokens, too few to "
            "judge them by; give more data or more --calibration-tokens"
        )
    outliers = super_experts(statistics)
    for layer in plan.layers:
        alone = {group.experts[0] for group in layer.groups if len(group.experts) == 1}
        if lost := [e for e in outliers.get(layer.name, []) if e not in alone]:
            found.append(
                f"experts {lost} of layer {layer.name!r} have outputs that dwarf all others (super experts), "
                "and the plan merges or removes them; that may ruin the model"
            )
    return tuple(found)


def size_warnings(*, source: int, loaded: int, written: int, dtypes: tuple[str, str]) -> tuple[str, ...]:
    """What keeps the sizes of two checkpoints from showing what the compression alone has saved.

    Args:
        source: Bytes of the tensors in the original's files.
        loaded: Bytes of the original's tensors in memory.
        written: Bytes of the tensors in the result's files.
        dtypes: Of the original as its config says, and of the result.
    """
    found = []
    if written > source:
        found.append(
            f"the result is larger than the original: its weights take {written:,} bytes on disk, the "
            f"original's {source:,}"
        )
    if dtypes[0] != dtypes[1]:
        found.append(
            f"the original is {dtypes[0]} and the result {dtypes[1]}: a part of what was lost, and of the "
            "change in size, comes from that"
        )
    if abs(loaded - source) > SIZE_SHARE * source:
        found.append(
            f"the original's weights take {source:,} bytes on disk and {loaded:,} as loaded ({dtypes[1]}): "
            "the sizes of single parts are those in memory, and do not add up to the total before"
        )
    return tuple(found)


def layer_reports(plan: CompressionPlan, statistics: RoutingStatistics) -> list[LayerReport]:
    """Load, similarity and groups of each layer."""
    reports = []
    for layer in plan.layers:
        known = statistics.layers.get(layer.name)
        measured: dict[str, Any] = {"usage": [0.0] * layer.num_experts}
        if known is not None:
            measured = {
                "usage": known.usage.tolist(),
                "similarity": known.logit_cosine.numpy() if known.logit_gram.any() else None,
                "too_few": [e for e in known.too_few(MIN_TOKENS) if e not in known.dead],
                "dead": known.dead,
                "entropy": known.entropy,
            }
        sizes = {"num_experts": layer.num_experts, "num_kept": layer.num_kept}
        told = {"name": layer.name, "group_of": layer.group_of, "fate": plan.fate}
        reports.append(LayerReport(**told, **sizes, **measured))
    return reports


def report_content(run: Run) -> ReportContent:
    """Everything that the report shows."""
    plan, options, measured = run.plan, run.options, run.measured
    parts = [part for part in PARTS if run.before.bytes[part] or run.after.bytes[part]]
    return ReportContent(
        title=_title(run),
        model=options.model,
        method=plan.method,
        grouping=str(plan.settings.get("grouping", "as planned")),
        router=plan.router,
        form=run.form,
        command=command_line("compress", options),
        versions=versions(),
        seed=options.seed,
        plan_hash=plan.hash,
        layers=layer_reports(plan, run.statistics),
        num_parameters=(run.before.total_parameters, run.after.total_parameters),
        num_bytes=(run.source_bytes, run.written_bytes),
        parameters_by_part={
            part: (run.before.parameters[part], run.after.parameters[part]) for part in parts
        },
        bytes_by_part={part: (run.before.bytes[part], run.after.bytes[part]) for part in parts},
        overall=None if measured is None else DomainRow.from_measured(measured.fidelity.overall),
        domains=() if measured is None else [DomainRow.from_measured(d) for d in measured.fidelity.domains],
        generation=() if measured is None else measured.generation,
        throughput=() if measured is None else measured.throughput,
        warnings=run.warnings,
        settings=_settings(run),
        healing=[] if run.one_shot is None else [HealingRow(*row) for row in fidelity_rows(run)],
        is_healed=run.healing is not None,
        gains=_gains(run),
    )


def _title(run: Run) -> str:
    before, after = run.experts
    kept = f"{before} to {after} experts" if before != after else f"{before} experts"
    rank = "" if run.plan.low_rank is None else f" of rank {run.plan.low_rank.rank}"
    return f"{short_name(run.options.model)}: {kept}{rank}"


def _gains(run: Run) -> GainMap | None:
    options = run.options
    if run.reached is None or options.until_collapse_risk is None:
        return None
    floor, risk = options.quality_floor, options.until_collapse_risk
    return gain_map(run.reached, floor=floor, risk=risk)


def _descent(run: Run) -> dict[str, Any] | None:
    """Every cut and, with it, the gain map that the report draws."""
    gains = _gains(run)
    if run.reached is None or gains is None:
        return None
    trail = asdict(run.reached.trail)
    told_elsewhere = ("merging", "healing")
    return {key: value for key, value in trail.items() if key not in told_elsewhere} | {
        "gain_map": asdict(gains)
    }


def _settings(run: Run) -> dict[str, str]:
    tokens = max((layer.num_tokens for layer in run.statistics.layers.values()), default=0)
    facts = {"data": run.data, "calibration tokens": f"{tokens:,}"}
    facts |= {key: str(value) for key, value in run.plan.settings.items() if value not in (None, [], "")}
    facts["alignment"] = run.plan.alignment.method
    if (rule := run.plan.low_rank) is not None:
        facts |= {"rank": str(rule.rank), "share of rows that S holds": f"{rule.sparse_rows:g}"}
        facts["those rows"] = (
            "pruned while healing" if run.options.prune_rows else "worst of the decomposition"
        )
    if run.healing is not None:
        facts |= {f"healing, {name}": str(value) for name, value in run.healing.to_dict().items()}
    facts["largest relative difference of logits after reloading"] = f"{run.reload_difference:.2g}"
    return facts


def write_run_file(run: Run, folder: Path) -> None:
    """Write `run.json`: what was asked, with what, and what came out."""
    config = {
        key: str(value) if isinstance(value, Path) else value for key, value in asdict(run.options).items()
    }
    facts = {
        "format": FORMAT,
        "version": 1,
        "command": command_line("compress", run.options),
        "config": config,
        "plan": {
            "hash": run.plan.hash,
            "method": run.plan.method,
            "form": run.form,
            "router": run.plan.router,
            **{key: value for key, value in run.plan.settings.items() if key not in ("experts", "ratio")},
        },
        "versions": versions(),
        "platform": platform.platform(),
        "seed": run.options.seed,
        "data": {"source": run.data, "fingerprint": run.statistics.fingerprint.get("data")},
        "metrics": {
            "experts": {"before": run.experts[0], "after": run.experts[1]},
            "footprint": {"before": run.before.to_dict(), "after": run.after.to_dict()},
            "tensor_bytes": {
                "source": run.source_bytes,
                "predicted": run.after.total_bytes,
                "written": run.written_bytes,
            },
            "reload_logit_difference": run.reload_difference,
            "merging": run.merging,
            **({} if run.measured is None else run.measured.to_dict()),
            "one_shot": None if run.one_shot is None else run.one_shot.to_dict(),
        },
        "healing": None if run.healing is None else {**run.healing.to_dict(), "history": run.healing.history},
        "descent": _descent(run),
        "warnings": list(run.warnings),
    }
    text = json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def read_run_file(folder: Path) -> dict[str, Any]:
    """The `run.json` of a folder that `moekit compress` made; empty for any other."""
    try:
        facts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and facts.get("format") == FORMAT else {}


def write_model_card(run: Run, folder: Path) -> None:
    """Write `README.md` as the hub shows it: what this is, what was lost, how to load it."""
    base = "" if Path(run.options.model).exists() else f"base_model: {run.options.model}\n"
    note = "import moekit.moe  # teaches transformers the moekit form\n" if run.form == "moekit" else ""
    lines = [f"- {name}: {' -> '.join(values)}" for name, *values in summary_rows(run)]
    content = report_content(run)
    warnings = "".join(f"- {warning}\n" for warning in run.warnings)
    card = f"""---
library_name: transformers
{base}tags: [moekit, mixture-of-experts, compressed]
---

# {content.title}

Made by moekit {versions()["moekit"]} from `{run.options.model}` with the method {run.plan.method}
(router: {run.plan.router}, form: {run.form}). {verdict(content)}

## Numbers

{chr(10).join(lines)}

{f"## Warnings{chr(10)}{chr(10)}{warnings}" if warnings else ""}
## Load it

```python
{note}from transformers import {run.model_class}

model = {run.model_class}.from_pretrained("path/or/hub-id")
```

## How it was made

`{content.command}`

`plan.json` says what became of each expert; `run.json` holds the settings and every number.
"""
    (folder / "README.md").write_text(card.replace("\n\n\n", "\n\n"), encoding="utf-8")


def summary_rows(run: Run) -> list[tuple[str, ...]]:
    """The figures that matter most: before, one-shot if it was healed and measured, and after."""
    before, after = run.before, run.after
    sizes = [
        ("experts in all layers", str(run.experts[0]), str(run.experts[1])),
        ("parameters", millions(before.total_parameters), millions(after.total_parameters)),
        ("weights on disk", megabytes(run.source_bytes), megabytes(run.written_bytes)),
    ]
    if run.one_shot is None:
        return sizes + fidelity_rows(run)
    return [(name, old, new, new) for name, old, new in sizes] + fidelity_rows(run)


def fidelity_rows(run: Run) -> list[tuple[str, ...]]:
    """What was measured, as in `summary_rows`; nothing if nothing was."""
    stages = [_measured_rows(found) for found in (run.one_shot, run.measured) if found is not None]
    if not stages:
        return []
    return [(*first[:2], *(stage[number][2] for stage in stages)) for number, first in enumerate(stages[0])]


def _measured_rows(measured: Measurements) -> list[tuple[str, str, str]]:
    overall = measured.fidelity.overall
    perplexities = (overall.perplexity_original.value, overall.perplexity_compressed.value)
    rows = [
        ("perplexity, held-out text", *(f"{value:.4g}" for value in perplexities)),
        ("KL to the original (nats/token)", "0", f"{overall.kl.value:.4f}"),
        ("same most likely next token", "100.0%", f"{overall.top1_agreement.value:.1%}"),
    ]
    return rows + [_row(row) for row in (*measured.generation, *measured.throughput)]


def _row(row: Comparison) -> tuple[str, str, str]:
    name = f"{row.name} (of {row.count})" if row.count else row.name
    if row.unit == "share":
        return name, f"{row.before:.1%}", f"{row.after:.1%}"
    return f"{name}, {row.unit}", f"{row.before:,.0f}", f"{row.after:,.0f}"


def summary_table(run: Run) -> Table:
    """The table that ends the command."""
    title = f"{short_name(run.options.model)}: before and after"
    stages = ["before", "after"] if run.one_shot is None else ["before", "one-shot", "healed"]
    return table(title, ["", *stages], summary_rows(run))
