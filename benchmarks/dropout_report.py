"""Tables and figures of the SMoE-Dropout benchmarks for `docs/train.md`, from their results alone.

    python benchmarks/dropout_report.py

A table goes between `<!-- table: NAME -->` and `<!-- end -->`, a figure into `figures/` beside the document.
Cells are means over the seeds ± half the width of the 95 % Student interval; with one seed there is none.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from quality_report import PALETTE, mean_and_interval

Row = dict[str, Any]
MISSING = "–"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
COLOURS = (*PALETTE[:2], *PALETTE[3:], "#56B4E9", PALETTE[2])
DODGE = 0.03
"""By which the points of neighbouring lines stand apart, so that their intervals can be told apart."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write what there are results for."""

    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/train.md")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Means and half intervals of one arm by K."""

    label: str
    points: dict[int, tuple[float, float]]
    seeds: int

    @classmethod
    def of(cls, label: str, curves: list[dict[str, float]]) -> "Line":
        """From one curve, ``{K: value}``, for each seed."""
        ks = sorted({int(k) for curve in curves for k in curve})
        found = {k: [curve[str(k)] for curve in curves if str(k) in curve] for k in ks}
        return cls(label=label, points={k: mean_and_interval(v) for k, v in found.items()}, seeds=len(curves))

    @property
    def is_dense(self) -> bool:
        """Whether it has no K."""
        return len(self.points) == 1


def lines_of(rows: list[Row], key: str) -> list[Line]:
    """A line for each arm whose rows have the key, in the order of the file."""
    arms = dict.fromkeys(row["arm"] for row in rows if key in row)
    return [Line.of(arm, [row[key] for row in rows if row["arm"] == arm and key in row]) for arm in arms]


def cells(line: Line, ks: Iterable[int], number: Callable[[float], str]) -> list[str]:
    """Mean ± half interval at each K, and the number of seeds."""
    shown = []
    for k in ks:
        mean, half = line.points.get(k, (None, 0.0))
        interval = f" ± {number(half)}" if line.seeds > 1 else ""
        shown.append(MISSING if mean is None else number(mean) + interval)
    return [*shown, str(line.seeds)]


def markdown(head: list[str], body: Iterable[list[str]]) -> str:
    """A table."""
    rules = "|" + "---|" * len(head)
    return "\n".join(
        ["| " + " | ".join(head) + " |", rules, *("| " + " | ".join(row) + " |" for row in body)]
    )


def ks_of(lines: Iterable[Line]) -> list[int]:
    """Every K that was measured."""
    return sorted({k for line in lines for k in line.points})


def heads(ks: Iterable[int]) -> list[str]:
    """The columns of `cells`."""
    return [*(f"K = {k}" for k in ks), "seeds"]


def significant(value: float) -> str:
    """Perplexities of all sizes: three digits or so, large ones with an exponent."""
    if value >= 10_000:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def draw(axes: Axes, lines: list[Line], *, like: list[Line] | None = None, scale: float = 1.0) -> None:
    """Lines against K with intervals, arms without a K as horizontal lines in black and grey.

    Args:
        axes: Where.
        lines: What.
        like: The lines of another panel, whose colours and markers are taken.
        scale: Of the values.
    """
    order = [line.label for line in like or lines if not line.is_dense]
    dodge = DODGE if any(line.seeds > 1 for line in lines) else 0.0
    for line in lines:
        if line.is_dense:
            continue
        index = order.index(line.label)
        shift = 2 ** (dodge * (index - (len(order) - 1) / 2))
        means, halves = zip(*line.points.values(), strict=True)
        axes.errorbar(
            [k * shift for k in line.points],
            [mean * scale for mean in means],
            yerr=[half * scale for half in halves] if line.seeds > 1 else None,
            label=line.label,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            capsize=3,
        )
    for line, colour in zip((line for line in lines if line.is_dense), ("black", "dimgrey"), strict=False):
        ((mean, half),) = line.points.values()
        style: Any = "-" if colour == "black" else "--"
        axes.axhline(mean * scale, color=colour, linestyle=style, linewidth=1.3, label=line.label)
        axes.axhspan((mean - half) * scale, (mean + half) * scale, color=colour, alpha=0.08, linewidth=0)


def dress(axes: Axes, title: str, ks: list[int]) -> None:
    """What all panels have in common."""
    axes.set_title(title, fontsize=11)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlim(ks[0] / 1.15, ks[-1] * 1.15)
    axes.set_xlabel("active experts K of 16")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def panels(
    titles: list[str], ks: list[int], *, height: float = 4.6, sharey: bool = False
) -> tuple[Figure, Any]:
    """Panels side by side."""
    figure = Figure(figsize=(9, height), layout="constrained")
    found = figure.subplots(1, len(titles), sharey=sharey, squeeze=False)[0]
    for axes, title in zip(found, titles, strict=True):
        dress(axes, title, ks)
    return figure, found


def legend_below(figure: Figure, axes: Iterable[Axes], columns: int) -> None:
    """One legend for all panels."""
    entries = {
        label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def report_dropout_lm(rows: list[Row]) -> tuple[str, Figure]:
    """Bits per character from scratch: schedules on the left, routers on the right."""
    lines = lines_of(rows, "bpc")
    ks = ks_of(lines)
    body = ([line.label, *cells(line, ks, "{:.3f}".format)] for line in lines)
    figure, (left, right) = panels(["schedules of SMoE-Dropout", "routers"], ks, height=5.4)
    schedules = [line for line in lines if line.label.startswith("SMoE-Dropout")]
    dense = [line for line in lines if line.is_dense]
    others = [line for line in lines if line not in schedules and not line.is_dense]
    draw(left, schedules + dense)
    draw(right, schedules[:1] + others + dense)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8.5)
        axes.set_ylabel("bits per character (lower is better)")
    return markdown(["arm", *heads(ks)], body), figure


def report_carve_smollm2(rows: list[Row]) -> tuple[str, Figure]:
    """Perplexity of a carved pretrained model, as carved and after a short training."""
    states = {"before": "as carved", "after": "after training"}
    lines = {state: lines_of(rows, state) for state in states}
    ks = ks_of(line for found in lines.values() for line in found)
    body = [
        [line.label, title, *cells(line, ks, significant)]
        for arm in dict.fromkeys(row["arm"] for row in rows)
        for state, title in states.items()
        for line in lines[state]
        if line.label == arm
    ]
    figure, found = panels(list(states.values()), ks, sharey=True)
    for axes, state in zip(found, states, strict=True):
        draw(axes, lines[state], like=lines["before"])
        axes.set_yscale("log")
    found[0].set_ylabel("perplexity (log scale)")
    legend_below(figure, found, 4)
    return markdown(["arm", "state", *heads(ks)], body), figure


def report_dropout_reasoning(rows: list[Row]) -> tuple[str, Figure]:
    """Accuracy on each set of word problems."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = {name: lines_of([row for row in rows if row["set"] == name], "accuracy") for name in sets}
    ks = ks_of(line for found in lines.values() for line in found)
    body = [
        [name, line.label, *cells(line, ks, lambda share: f"{100 * share:.1f} %")]
        for name in sets
        for line in lines[name]
    ]
    figure, found = panels(sets, ks, height=4.2)
    for axes, name in zip(found, sets, strict=True):
        draw(axes, lines[name], scale=100)
        shares = [100 * row["majority"] for row in rows if row["set"] == name]
        axes.axhline(mean_and_interval(shares)[0], color="grey", linestyle=":", label="commonest operation")
        axes.set_ylim(0, 100)
    found[0].set_ylabel("accuracy (%)")
    legend_below(figure, found, 5)
    return markdown(["set", "arm", *heads(ks)], body), figure


REPORTS: dict[str, Callable[[list[Row]], tuple[str, Figure]]] = {
    "dropout_lm": report_dropout_lm,
    "carve_smollm2": report_carve_smollm2,
    "dropout_reasoning": report_dropout_reasoning,
}


def insert_table(text: str, name: str, table: str) -> str:
    """The document with a new table between the markers of that name.

    Raises:
        ValueError: There are none, or several.
    """
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = place.subn(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"{count} places are marked '<!-- table: {name} -->' ... '<!-- end -->', not one")
    return text


def main(config: ReportConfig) -> None:
    """Write all tables and figures that there are results for."""
    text = config.document.read_text(encoding="utf-8")
    for name, report in REPORTS.items():
        path = config.results / f"{name}.jsonl"
        if path.exists():
            table, figure = report(
                [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            )
            text = insert_table(text, name, table)
            figure.savefig(config.document.parent / "figures" / f"{name}.png", dpi=110)
    config.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
