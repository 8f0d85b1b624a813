"""Tables and figures of `rl_methods.py` and `rl_recovery.py` for `docs/rl.md`, from results alone.

    python benchmarks/rl_report.py

Means over the seeds ± half the width of the 95 % Student interval. Differences are paired: the same policy,
prompts, and seeds of sampling.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from distill_report import cell
from dropout_report import MISSING, insert_table, markdown
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from moekit.rl.entropy_law import fit_entropy_law
from quality_report import PALETTE, mean_and_interval
from rl_methods import ARMS
from rl_recovery import CUT, CUT_RL, FULL, HEALED, HEALED_RL

Row = dict[str, Any]
BASE, BASE_2 = "GRPO", "GRPO, 2 updates"
LATE = 20
"""Last steps, over which noisy numbers are averaged."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write what there are results for."""

    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/rl.md")


def read(path: Path) -> list[Row]:
    """Rows of a file of results; none if it is missing."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def last(row: Row, name: str) -> float:
    """Of the last evaluation."""
    return next(r[name] for r in reversed(row["history"]) if name in r)


def first(row: Row, name: str) -> float:
    """Of the evaluation before the training."""
    return next(r[name] for r in row["history"] if name in r)


def late(row: Row, name: str) -> float:
    """Mean over the last steps."""
    values = [r[name] for r in row["history"] if r.get(name) is not None and r["step"] > 0]
    return float(np.mean(values[-LATE:]))


def of(rows: list[Row], arm: str, value: Callable[[Row], float]) -> list[float]:
    """A value of each seed of an arm, in the order of the seeds."""
    return [value(row) for row in sorted(rows, key=lambda r: r["seed"]) if row["arm"] == arm]


def paired(rows: list[Row], arm: str, base: str, value: Callable[[Row], float]) -> list[float]:
    """Differences of an arm to another with the same seeds."""
    against = {row["seed"]: value(row) for row in rows if row["arm"] == base}
    mine = sorted((r for r in rows if r["arm"] == arm and r["seed"] in against), key=lambda r: r["seed"])
    return [value(row) - against[row["seed"]] for row in mine]


def methods_table(rows: list[Row]) -> str:
    """A line for each arm."""
    head = [
        "method",
        "pass@1",
        "against GRPO, same updates",
        "pass@16",
        "right answers of a prompt",
        "entropy",
    ]
    start = [100 * first(row, "eval_pass@1") for row in rows]
    starts = [f"{start[0]:.1f}", MISSING, f"{100 * first(rows[0], 'eval_pass@16'):.1f}"]
    body = [["before", *starts, f"{first(rows[0], 'eval_distinct_correct'):.2f}", MISSING]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        base = BASE_2 if ARMS[arm].updates["mini_batches"] > 1 else BASE
        gain = paired(rows, arm, base, lambda r: 100 * last(r, "eval_pass@1"))
        body.append(
            [
                arm,
                cell(of(rows, arm, lambda r: 100 * last(r, "eval_pass@1")), 1),
                MISSING if arm == base else cell(gain, 1),
                cell(of(rows, arm, lambda r: 100 * last(r, "eval_pass@16")), 1),
                cell(of(rows, arm, lambda r: last(r, "eval_distinct_correct"))),
                cell(of(rows, arm, lambda r: late(r, "entropy"))),
            ]
        )
    return markdown(head, body)


def law(row: Row) -> float:
    """R² of R = -a e^H + b over the evaluations of a run."""
    pairs = []
    for number, entry in enumerate(row["history"]):
        if "eval_pass@1" in entry and number:
            window = row["history"][max(1, number - 9) : number + 1]
            pairs.append(
                (float(np.mean([r["entropy"] for r in window if "entropy" in r])), entry["eval_pass@1"])
            )
    return fit_entropy_law(*zip(*pairs, strict=True)).r_squared


@dataclass(frozen=True)
class Claim:
    """What a paper says of its method, and the numbers that would show it here."""

    arm: str
    text: str
    measure: str
    base: str
    value: Callable[[Row], float]
    sign: int
    """+1 if the claim is that it is larger, -1 smaller."""
    digits: int = 1


def _percent(name: str) -> Callable[[Row], float]:
    return lambda row: 100 * last(row, name)


def _drop(row: Row) -> float:
    """Points below the best evaluation at the end."""
    passed = [100 * r["eval_pass@1"] for r in row["history"] if "eval_pass@1" in r]
    return max(passed) - passed[-1]


def _spread(row: Row) -> float:
    """Standard deviation of the entropy over the steps."""
    return float(np.std([r["entropy"] for r in row["history"] if "entropy" in r]))


CLAIMS = (
    Claim("GTPO", "no late collapse", "points below its best at the end", BASE, _drop, -1),
    Claim("Clip-Cov", "entropy stays", "entropy, last steps", BASE_2, lambda r: late(r, "entropy"), 1, 2),
    Claim("KL-Cov", "entropy stays", "entropy, last steps", BASE_2, lambda r: late(r, "entropy"), 1, 2),
    Claim("KL-Cov", "better than GRPO", "pass@1", BASE_2, _percent("eval_pass@1"), 1),
    Claim(
        "ROVER",
        "more distinct right answers",
        "of a prompt",
        BASE_2,
        lambda r: last(r, "eval_distinct_correct"),
        1,
        2,
    ),
    Claim("ROVER", "higher pass@k", "pass@16", BASE_2, _percent("eval_pass@16"), 1),
    Claim("DPH-RL", "keeps pass@k, which GRPO loses", "pass@16", BASE, _percent("eval_pass@16"), 1),
    Claim("RL-PLUS", "learns beyond its own samples", "pass@16", BASE, _percent("eval_pass@16"), 1),
    Claim("RL-PLUS", "better than GRPO", "pass@1", BASE, _percent("eval_pass@1"), 1),
    Claim("HBPO", "fewer tokens", "tokens of a completion", BASE, lambda r: last(r, "eval_length"), -1, 2),
    Claim("HBPO", "at equal accuracy", "pass@1", BASE, _percent("eval_pass@1"), 1),
    Claim("EPO", "entropy varies less", "deviation over the steps", BASE, _spread, -1, 2),
)


def claims_table(rows: list[Row]) -> str:
    """A line for each claim that there are results for."""
    body = []
    for claim in CLAIMS:
        found = paired(rows, claim.arm, claim.base, claim.value)
        if not found:
            continue
        mean, half = mean_and_interval(found)
        seen = claim.sign * mean
        sure = len(found) > 1 and abs(mean) > half
        verdict = ("seen" if seen > 0 else "the opposite") if sure else "not to be told from chance"
        measure = f"{claim.measure}, less {claim.base}'s"
        body.append([claim.arm, claim.text, measure, cell(found, claim.digits), verdict])
    grpo = [law(row) for row in rows if row["arm"] in (BASE, BASE_2)]
    if grpo:
        body.append(
            ["GRPO", "R = -a e^H + b", "R² over the evaluations of a run", cell(grpo, 2), "see the interval"]
        )
    return markdown(["method", "claim", "measure", "what we saw", "verdict"], body)


def methods_figure(rows: list[Row]) -> Figure:
    """Accuracy, pass@16 and entropy over the steps, GRPO in grey behind each method."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm not in (BASE, BASE_2)]
    names = ("eval_pass@1", "eval_pass@16", "entropy")
    figure = Figure(figsize=(9, 1.5 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), len(names), sharex=True, sharey="col", squeeze=False)
    for arm, line in zip(arms, grid, strict=True):
        base = BASE_2 if ARMS[arm].updates["mini_batches"] > 1 else BASE
        for name, axes in zip(names, line, strict=True):
            for shown, colour, label in ((base, "#9aa0a6", "GRPO"), (arm, PALETTE[0], arm)):
                steps, values = curve(rows, shown, name)
                axes.plot(steps, values.mean(0), color=colour, linewidth=1.6, label=label)
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
        line[0].set_ylabel(arm, rotation=0, ha="right", va="center")
    for name, axes in zip(("pass@1", "pass@16", "entropy, nats"), grid[0], strict=True):
        axes.set_title(name, loc="left", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    entropy = grid[0][2]
    entropy.set_yscale("log")  # one policy falls apart
    entropy.set_yticks([0.5, 1, 2, 4], labels=["0.5", "1", "2", "4"])
    entropy.yaxis.set_minor_locator(NullLocator())
    return figure


def curve(rows: list[Row], arm: str, name: str) -> tuple[Sequence[int], np.ndarray]:
    """Steps, and values ``[seeds, steps]``, of single steps smoothed."""
    runs = [
        {r["step"]: r[name] for r in row["history"] if r.get(name) is not None}
        for row in rows
        if row["arm"] == arm
    ]
    # A step that was skipped has no entropy.
    steps = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[step] for step in steps] for run in runs])
    if not name.startswith("eval_"):
        width = 10
        kernel = np.ones(width) / width
        values = np.array([np.convolve(v, kernel, mode="valid") for v in values])
        steps = steps[width - 1 :]
    return steps, values


RECOVERY = (FULL, CUT, CUT_RL, HEALED, HEALED_RL)


def recovery_table(rows: list[Row]) -> str:
    """A line for each model."""
    body = []
    for model in RECOVERY:
        found = [row["evaluation"] for row in rows if row["model"] == model]
        if found:
            names = ("eval_pass@1", "eval_pass@8", "eval_distinct_correct")
            values = [[100 * r[n] if "pass" in n else r[n] for r in found] for n in names]
            body.append([model, *(cell(v, d) for v, d in zip(values, (1, 1, 2), strict=True))])
    return markdown(["model", "pass@1", "pass@8", "different right answers of a prompt"], body)


def recovery_figure(rows: list[Row]) -> Figure:
    """Accuracy over the steps of RL, between lines of the models that it begins and is compared with."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    full = np.mean([100 * row["evaluation"]["eval_pass@1"] for row in rows if row["model"] == FULL])
    axes.axhline(float(full), color="#30363d", linewidth=1.2, linestyle="--")
    axes.annotate(FULL, (0.99, full), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    for model, colour in ((CUT_RL, PALETTE[0]), (HEALED_RL, PALETTE[1])):
        curves = [row["curve"] for row in rows if row["model"] == model]
        if not curves:
            continue
        steps = [point["step"] for point in curves[0]]
        values = 100 * np.array([[point["eval_pass@1"] for point in run] for run in curves])
        axes.plot(steps, values.mean(0), color=colour, linewidth=1.8, marker="o", markersize=3.5, label=model)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("steps of RL, 128 completions each")
    axes.set_ylabel("held-out sums answered, %")
    axes.set_ylim(0, 1.12 * float(full))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure


def main(config: ReportConfig) -> None:
    """Tables into the document, figures beside it."""
    document = config.document.read_text(encoding="utf-8")
    figures = config.document.parent / "figures"
    if rows := read(config.results / "rl_methods.jsonl"):
        document = insert_table(document, "rl_methods", methods_table(rows))
        document = insert_table(document, "rl_claims", claims_table(rows))
        methods_figure(rows).savefig(figures / "rl_methods.png", dpi=64)
    if rows := read(config.results / "rl_methods_long.jsonl"):
        document = insert_table(document, "rl_claims_long", claims_table(rows))
    if rows := read(config.results / "rl_recovery.jsonl"):
        document = insert_table(document, "rl_recovery", recovery_table(rows))
        recovery_figure(rows).savefig(figures / "rl_recovery.png", dpi=130)
    config.document.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
