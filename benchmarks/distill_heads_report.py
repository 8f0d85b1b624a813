"""Table and figure of `distill_heads.py` from what it measured."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"dense": "#999999", "fused": "#0072B2", "fused dual": "#D55E00"}
Row = dict[str, Any]


def cases(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Size and dtype of each comparison."""
    return list(dict.fromkeys((row["size"], row["dtype"]) for row in result["rows"]))


def select(result: dict[str, Any], case: tuple[str, str]) -> list[Row]:
    """Variants of one comparison."""
    return [row for row in result["rows"] if (row["size"], row["dtype"]) == case]


def title(result: dict[str, Any], case: tuple[str, str]) -> str:
    """Sizes and dtype in words."""
    size = result["sizes"][case[0]]
    return f"V = {size['V']:,}, D = {size['D']:,}, N = {size['N']:,}, {case[1]}"


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| size | variant | step, s | peak, MB | time / dense | memory / dense | time / fused plain KD |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases(result):
        for row in select(result, case):
            low, high = row["seconds_95"]
            cells = [title(result, case), row["variant"], f"{row['seconds']:.2f} ({low:.2f}–{high:.2f})"]
            cells.append(f"{row['megabytes']:.0f}")
            if "time_to_dense" in row:
                low, high = row["time_to_dense_95"]
                cells.append(f"{row['time_to_dense']:.2f} ({low:.2f}–{high:.2f})")
                cells.append(f"{row['memory_to_dense']:.2f}")
            else:
                cells += ["", ""]
            cells.append(f"{row['time_to_fused_kd']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals(result: dict[str, Any]) -> str:
    """Which aims are reached: 0.7 of the time and half the memory; two heads 1.15 of plain distillation."""
    lines = []
    for row in result["rows"]:
        if "time_to_dense" not in row:
            continue
        is_dual = "dual" in row["variant"]
        found = [row["time_to_dense"] <= (1.15 if is_dual else 0.7), row["memory_to_dense"] <= 0.5]
        if is_dual:
            found.append(row["time_to_fused_kd"] <= 1.15)
        marks = ["yes" if reached else "NO" for reached in found]
        lines.append(f"- {title(result, (row['size'], row['dtype']))}, {row['variant']}: {', '.join(marks)}")
    return "Aims (time against dense, memory; for two heads also time against fused plain KD):\n" + "\n".join(
        lines
    )


def draw(axes: Any, rows: list[Row], key: str, unit: str) -> None:
    """Bars of one quantity, with the ratio to the dense variant written on them."""
    places = np.arange(len(rows))[::-1]
    kinds = ["fused dual" if "dual" in row["variant"] else row["variant"].split()[0] for row in rows]
    values = np.array([row[key] for row in rows])
    bars = np.abs(np.array([row.get(f"{key}_95", [row[key]] * 2) for row in rows]).T - values)
    axes.barh(places, values, xerr=bars, color=[COLOURS[kind] for kind in kinds], height=0.75)
    ratio = {"seconds": "time_to_dense", "megabytes": "memory_to_dense"}[key]
    for place, row, end in zip(places, rows, values + bars[1], strict=True):
        if ratio in row:
            axes.text(end + 0.015 * values.max(), place, f"{row[ratio]:.2f}×", va="center", fontsize=8.5)
    axes.set_yticks(places, [row["variant"] for row in rows], fontsize=9)
    axes.set_xlim(0, values.max() * 1.13)
    axes.set_xlabel(unit, fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def figure(result: dict[str, Any]) -> Figure:
    """Time and memory of all variants, one line of panels for each size and dtype."""
    found = cases(result)
    fig = Figure(figsize=(9.5, 2.5 * len(found) + 0.5), layout="constrained")
    panels = fig.subplots(len(found), 2, sharey="row", squeeze=False)
    for line, case in zip(panels, found, strict=True):
        rows = select(result, case)
        draw(line[0], rows, "seconds", "step, s of one CPU thread")
        draw(line[1], rows, "megabytes", "memory added at the peak of a step, MB")
        line[0].set_title(title(result, case), fontsize=10, loc="left")
    fig.suptitle(
        "Heads of a distillation step, forward and backward. ×: against the dense loss; dual heads against "
        "dense plain KD.",
        fontsize=10,
    )
    return fig
