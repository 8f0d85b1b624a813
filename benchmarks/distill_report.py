"""Tables and figures of `distill_digits.py` and `distill_text.py` for `docs/distill.md`, from results alone.

    python benchmarks/distill_report.py

Means over the seeds ± half the width of the 95 % Student interval. Gains are paired: the same teacher, split,
first weights and batches with labels only.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from distill_arms import BASE
from dropout_report import MISSING, insert_table, markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_report import PALETTE, mean_and_interval

COSINES = {
    "cosines": {"classifier": "cosine, classifier", "backbone": "cosine, backbone"},
    "late_cosines": {"classifier": "classifier, at the end", "backbone": "backbone, at the end"},
}
"""Of the whole training, and of its last tenth where that was kept."""
COLLAPSE = {"within_class": "NC1", "classifier_angles": "classifier angles", "duality": "duality"}
ROUNDING = 1e-6
MARKS: dict[str, dict[str, Any]] = {
    "classifier": {"fmt": "s", "color": PALETTE[1]},
    "backbone": {"fmt": "o", "color": PALETTE[0]},
}
DODGE = 0.15
"""By which classifier and backbone stand apart."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write what there are results for."""

    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/distill.md")


def points(row: Row) -> float:
    """Accuracy in percent."""
    return 100 * row["accuracy"]


def gains(rows: list[Row], arm: str, base: str = BASE, value: Callable[[Row], float] = points) -> list[float]:
    """A value of an arm less that of the same seed of another, by default accuracy against labels only."""
    against = {row["seed"]: value(row) for row in rows if row["arm"] == base}
    mine = [row for row in rows if row["arm"] == arm and row["seed"] in against]
    return [value(row) - against[row["seed"]] for row in mine]


def arms_of(rows: list[Row]) -> list[str]:
    """In the order of the file."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def sets_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each set by its name; one without a name if rows have none."""
    names = dict.fromkeys(row.get("set", "") for row in rows)
    return {name: [row for row in rows if row.get("set", "") == name] for name in names}


def cell(values: list[float], digits: int = 2) -> str:
    """Mean ± half interval, or the value that all have."""
    if not values:
        return MISSING
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(set(values)) > 1 else "")


def cosines_of(rows: list[Row], arm: str, key: str, where: str) -> list[float]:
    """One for each seed of the arm, if it has any."""
    return [row[key][where] for row in rows if row["arm"] == arm and where in row[key]]


def body_of(rows: list[Row]) -> list[list[str]]:
    """A line of the table for each arm, and the teacher's."""
    body = []
    for arm in arms_of(rows):
        mine = [row for row in rows if row["arm"] == arm]
        accuracies = cell([100 * row["accuracy"] for row in mine])
        gained = MISSING if arm == BASE else cell(gains(rows, arm))
        places = [(key, where) for key in COSINES if key in mine[0] for where in COSINES[key]]
        cosines = [cell(cosines_of(mine, arm, key, where)) for key, where in places]
        collapse = {name: [row["collapse"][name] for row in mine] for name in COLLAPSE}
        # The centred rows of two classes always point opposite ways.
        if max(collapse["classifier_angles"]) < ROUNDING:
            collapse["classifier_angles"] = []
        body.append([arm, accuracies, gained, *cosines, *map(cell, collapse.values())])
    seeds = {row["seed"]: row["teacher"] for row in rows}
    line = ["teacher", cell([100 * found for found in seeds.values()])]
    return [*body, [*line, *[MISSING] * (len(body[0]) - len(line))]]


def table(rows: list[Row]) -> str:
    """All sets below each other; their name is a column if there are several."""
    cosines = [title for key in COSINES if key in rows[0] for title in COSINES[key].values()]
    head = ["arm", "accuracy, %", "gain, points", *cosines, *COLLAPSE.values()]
    sets = sets_of(rows)
    if len(sets) == 1:
        return markdown(head, body_of(rows))
    return markdown(
        ["set", *head], [[name, *line] for name, found in sets.items() for line in body_of(found)]
    )


def draw(left: Axes, right: Axes, rows: list[Row]) -> None:
    """Gains on the left, how far the losses' gradients agree on the right."""
    arms = [arm for arm in arms_of(rows) if arm != BASE]
    places = range(len(arms))[::-1]
    for place, arm in zip(places, arms, strict=True):
        found = gains(rows, arm)
        mean, half = mean_and_interval(found)
        left.plot(found, [place] * len(found), "o", color="0.75", markersize=4)
        left.errorbar(mean, place, xerr=half, fmt="o", color=PALETTE[0], capsize=3)
        draw_cosines(right, rows, arm, place)
    left.set_yticks(places, arms)
    right.set_xlim(-1, 1)
    for axes in (left, right):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)


def draw_cosines(axes: Axes, rows: list[Row], arm: str, place: float) -> None:
    """Filled for the whole training, hollow for its end."""
    for where, style in MARKS.items():
        for key, fill in (("cosines", style["color"]), ("late_cosines", "white")):
            cosines = cosines_of(rows, arm, key, where) if key in rows[0] else []
            if not cosines:
                continue
            mean, half = mean_and_interval(cosines)
            label = f"in the {where}" + (", at the end" if key == "late_cosines" else "")
            height = place + (DODGE if where == "classifier" else -DODGE)
            axes.errorbar(
                mean, height, xerr=half, label=label, markerfacecolor=fill, markersize=5, capsize=2, **style
            )


def figure(rows: list[Row]) -> Figure:
    """A row of panels for each set."""
    sets = sets_of(rows)
    drawn = Figure(figsize=(9, 0.6 + 3.8 * len(sets)), layout="constrained")
    panels = drawn.subplots(len(sets), 2, sharey="row", sharex="col", squeeze=False)
    for (left, right), (name, found) in zip(panels, sets.items(), strict=True):
        draw(left, right, found)
        left.set_title(name, loc="left", fontsize=11)
    left, right = panels[-1]
    left.set_xlabel("accuracy against labels only, points (grey: seeds)")
    right.set_xlabel("cosine of the two losses' gradients")
    entries = dict(zip(*panels[0][1].get_legend_handles_labels()[::-1], strict=True))
    drawn.legend(entries.values(), entries, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return drawn


def main(config: ReportConfig) -> None:
    """Write tables and figures."""
    text = config.document.read_text(encoding="utf-8")
    drawn = {}
    for name in ("distill_digits", "distill_text"):
        path = config.results / f"{name}.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            text = insert_table(text, name, table(rows))
            drawn[name] = figure(rows)
    config.document.write_text(text, encoding="utf-8")
    for name, found in drawn.items():
        found.savefig(config.document.parent / "figures" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
