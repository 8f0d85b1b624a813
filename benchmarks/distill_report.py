"""Table and figure of `distill_digits.py` for `docs/distill.md`, from its results alone.

    python benchmarks/distill_report.py

Means over the seeds ± half the width of the 95 % Student interval. Gains are paired: the same teacher, split,
first weights and batches with labels only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from dropout_report import MISSING, insert_table, markdown
from matplotlib.figure import Figure
from quality_report import PALETTE, mean_and_interval

BASE = "labels only"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write what there are results for."""

    results: Path = Path("benchmarks/results/distill_digits.jsonl")
    document: Path = Path("docs/distill.md")


def gains(rows: list[Row], arm: str) -> list[float]:
    """Accuracy of an arm less that of its seed with labels only, in points."""
    base = {row["seed"]: row["accuracy"] for row in rows if row["arm"] == BASE}
    return [100 * (row["accuracy"] - base[row["seed"]]) for row in rows if row["arm"] == arm]


def cell(values: list[float], digits: int = 2) -> str:
    """Mean ± half interval."""
    if not values:
        return MISSING
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def digits_table(rows: list[Row]) -> str:
    """One row for each arm."""
    heads = [
        "arm",
        "accuracy, %",
        "gain, points",
        "cosine, classifier",
        "cosine, backbone",
        "NC1",
        "classifier angles",
        "duality",
    ]
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        cosines = [
            cell([row["cosines"][where] for row in mine if where in row["cosines"]])
            for where in ("classifier", "backbone")
        ]
        collapse = [
            cell([row["collapse"][name] for row in mine])
            for name in ("within_class", "classifier_angles", "duality")
        ]
        gained = MISSING if arm == BASE else cell(gains(rows, arm))
        body.append([arm, cell([100 * row["accuracy"] for row in mine]), gained, *cosines, *collapse])
    seeds = {row["seed"]: row["teacher"] for row in rows}
    body.append(["teacher", cell([100 * found for found in seeds.values()]), *[MISSING] * 6])
    return markdown(heads, body)


def digits_figure(rows: list[Row]) -> Figure:
    """Gains on the left, how far the losses' gradients agree on the right."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != BASE]
    places = list(range(len(arms)))[::-1]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for arm, place in zip(arms, places, strict=True):
        found = gains(rows, arm)
        mean, half = mean_and_interval(found)
        left.plot(found, [place] * len(found), "o", color="0.75", markersize=4)
        left.errorbar(mean, place, xerr=half, fmt="o", color=PALETTE[0], capsize=3)
        for where, colour, marker in (("classifier", PALETTE[1], "s"), ("backbone", PALETTE[0], "o")):
            cosines = [r["cosines"][where] for r in rows if r["arm"] == arm and where in r["cosines"]]
            if cosines:
                mean, half = mean_and_interval(cosines)
                label = f"in the {where}" if arm == arms[0] else None
                right.errorbar(mean, place, xerr=half, fmt=marker, color=colour, capsize=3, label=label)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(places, arms)
    left.set_xlabel("accuracy against labels only, points (grey: seeds)")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlim(-1, 1)
    right.set_xlabel("cosine of the two losses' gradients")
    right.legend(frameon=False, fontsize=9, loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(config: ReportConfig) -> None:
    """Write table and figure."""
    rows = [json.loads(line) for line in config.results.read_text(encoding="utf-8").splitlines()]
    text = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(text, "distill_digits", digits_table(rows)), encoding="utf-8")
    digits_figure(rows).savefig(config.document.parent / "figures" / "distill_digits.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
