"""Tables and figure of `distill_lm.py` and `distill_heal.py` for `docs/distill.md`, from results alone.

    python benchmarks/distill_lm_report.py

Means over the seeds ± half the width of the 95 % Student interval; differences are paired by seed: the same
first weights, blocks and steps with labels only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from dropout_report import MISSING, insert_table, markdown
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from quality_report import PALETTE, mean_and_interval

NAME, HEAL = "distill_lm", "distill_heal"
TEACHER, BASE = "teacher", "labels only"
ANSWERS = ("tasks", "sentiment", "trec")
TICKS = {"perplexity": (25, 50, 100, 200, 400, 800), "kl": (0.5, 1, 2, 4)}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LmReportConfig:
    """Write what there are results for."""

    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/distill.md")


def cell(values: list[float], digits: int) -> str:
    """Mean and half interval."""
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def body_of(rows: list[Row]) -> list[list[str]]:
    """A line for each arm."""
    base = {row["seed"]: row for row in rows if row["arm"] == BASE}
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        paired = [row for row in mine if row["seed"] in base]
        differences = [row["kl"] - base[row["seed"]]["kl"] for row in paired]
        body.append(
            [
                arm,
                cell([row["perplexity"] for row in mine], 1),
                cell([row["kl"] for row in mine], 3),
                MISSING if arm in (TEACHER, BASE) else cell(differences, 3),
                cell([100 * row["top1_agreement"] for row in mine], 1),
                *(cell([100 * row["accuracy"][name] for row in mine], 0) for name in ANSWERS),
                MISSING if arm == TEACHER else str(len(mine)),
            ]
        )
    return body


def heal_table(rows: list[Row]) -> str:
    """A line for each number of experts and arm."""
    body = []
    for experts, arm in dict.fromkeys((row["experts"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["experts"], row["arm"]) == (experts, arm)]
        cells = [cell([row["kl"] for row in mine], 3), cell([row["perplexity"] for row in mine], 1)]
        cells.append(cell([100 * row["top1_agreement"] for row in mine], 1))
        cells += [cell([100 * row["accuracy"][name] for row in mine], 0) for name in ANSWERS]
        body.append([f"16 → {experts}", arm, *cells])
    head = ["experts", "trained", "KL to the original", "perplexity", "same top-1, %"]
    return markdown([*head, *(f"{name}, %" for name in ANSWERS)], body)


def read(path: Path) -> list[Row]:
    """Lines of results; none if there is no such file."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def figure(rows: list[Row]) -> Figure:
    """Perplexity and KL of each arm, every seed a grey point."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != TEACHER]
    (teacher,) = [row for row in rows if row["arm"] == TEACHER]
    drawn = Figure(figsize=(9, 0.9 + 0.36 * len(arms)), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    places = range(len(arms))[::-1]
    for axes, key, label in zip(
        panels, ("perplexity", "kl"), ("perplexity", "KL to the teacher, nats"), strict=True
    ):
        for place, arm in zip(places, arms, strict=True):
            found = [row[key] for row in rows if row["arm"] == arm]
            mean, half = mean_and_interval(found)
            axes.plot(found, [place] * len(found), "o", color="0.75", markersize=4)
            axes.errorbar(mean, place, xerr=half, fmt="o", color=PALETTE[0], capsize=3)
        axes.set_xscale("log")
        axes.set_xticks(TICKS[key], [f"{tick:g}" for tick in TICKS[key]])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, axis="x", which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axvline(teacher["perplexity"], color="black", linewidth=0.8)
    panels[0].text(teacher["perplexity"], len(arms) - 0.6, " teacher", fontsize=9)
    panels[0].set_yticks(places, arms)
    return drawn


def main(config: LmReportConfig) -> None:
    """Write tables and figure."""
    rows, healed = read(config.results / f"{NAME}.jsonl"), read(config.results / f"{HEAL}.jsonl")
    head = ["arm", "perplexity", "KL to teacher", "against labels only", "same top-1, %"]
    head += [f"{name}, %" for name in ANSWERS] + ["seeds"]
    text = insert_table(config.document.read_text(encoding="utf-8"), NAME, markdown(head, body_of(rows)))
    if healed:
        text = insert_table(text, HEAL, heal_table(healed))
    config.document.write_text(text, encoding="utf-8")
    figure(rows).savefig(config.document.parent / "figures" / f"{NAME}.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(LmReportConfig))
