"""Table, break-even shares and figure of `dropout_speed.py` from what it measured."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#999999")
Rows = list[dict[str, Any]]


def select(result: dict[str, Any], **wanted: Any) -> Rows:
    """Rows that have these values."""
    return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]


def comparisons(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What identifies each comparison, in the order in which they were made."""
    keys = ("shape", "part", "step", "tokens")
    found = dict.fromkeys(tuple(row[key] for key in keys) for row in result["rows"])
    return [dict(zip(keys, values, strict=True)) for values in found]


def break_even(result: dict[str, Any], **comparison: Any) -> float:
    """Share from which the dense way is faster, between measured shares by interpolation; 1 if from none."""
    grouped, dense = (select(result, way=way, **comparison) for way in ("grouped", "dense"))
    shares = [row["active"] / result["num_experts"] for row in grouped]
    gains = [g["ratio"] - d["ratio"] for g, d in zip(grouped, dense, strict=True)]
    for i in range(1, len(gains)):
        if gains[i - 1] <= 0 < gains[i]:
            return float(np.interp(0, gains[i - 1 : i + 1], shares[i - 1 : i + 1]))
    return shares[0] if gains[0] > 0 else 1.0


def break_evens(result: dict[str, Any]) -> Rows:
    """The break-even share of each comparison of FFNs."""
    ffns = [comparison for comparison in comparisons(result) if comparison["part"] == "FFN"]
    return [{**comparison, "share": round(break_even(result, **comparison), 3)} for comparison in ffns]


def table(result: dict[str, Any], ways: tuple[str, ...] = ("chosen", "grouped", "dense")) -> str:
    """Markdown: time against the dense model's at every share, and the break-even shares."""
    actives = sorted({row["active"] for row in result["rows"]})
    heads = ["step", "dense, ms", *(f"{k}/{result['num_experts']}" for k in actives), "break-even"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    shares = iter(break_evens(result))
    for comparison in comparisons(result):
        ffn = comparison["part"] == "FFN"
        share = f"{next(shares)['share']:.2f}" if ffn else ""
        name = ", ".join([comparison["shape"], comparison["part"], f"T={comparison['tokens']}"])
        for way in ways:
            rows = select(result, **comparison, **({"chosen": True} if way == "chosen" else {"way": way}))
            if rows:
                cells = [f"{row['ratio']:.2f}" for row in rows]
                said = f", {way}" if len(ways) > 1 else ""
                head = f"{name}, {comparison['step']}{said}", f"{1e3 * rows[0]['dense_seconds']:.2f}"
                lines.append("| " + " | ".join([*head, *cells, share]) + " |")
    return "\n".join(lines)


def draw_panel(axes: Any, result: dict[str, Any], part: str, step: str) -> None:
    """Lines of all shapes in one panel; the ways that are not chosen are dashed."""
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    for shape, colour in zip(shapes, PALETTE, strict=False):
        comparison = {"shape": shape, "part": part, "step": step, "tokens": result["tokens"]}
        for way in ("grouped", "dense") if part == "FFN" else ():
            rows = select(result, way=way, **comparison)
            places = [row["active"] / result["num_experts"] for row in rows]
            axes.plot(places, [row["ratio"] for row in rows], "--", color=colour, linewidth=0.9, alpha=0.7)
        rows = select(result, chosen=True, **comparison)
        places = [row["active"] / result["num_experts"] for row in rows]
        ratios = np.array([row["ratio"] for row in rows])
        bars = np.abs(np.array([row["ratio_95"] for row in rows]).T - ratios)
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.8, "capsize": 2}
        axes.errorbar(places, ratios, yerr=bars, label=shape, **style)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(1.05, color="black", linewidth=0.8, linestyle=":")
    if part == "FFN":
        axes.plot(0.25, 0.55, marker="v", color="black", markersize=6)
    axes.set_title(f"{'one FFN' if part == 'FFN' else 'whole model'}, {step}", fontsize=11)
    axes.set_xticks([k / 8 for k in range(9)], ["0", "", "1/4", "", "1/2", "", "3/4", "", "1"])
    axes.set_ylim(0, 1.6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def figure(result: dict[str, Any]) -> Figure:
    """Time against the dense model's by the share of active experts."""
    fig = Figure(figsize=(9, 7), layout="constrained")
    panels = fig.subplots(2, 2, sharex=True, sharey=True)
    for row, part in enumerate(("FFN", "model")):
        for column, step in enumerate(("training", "inference")):
            draw_panel(panels[row][column], result, part, step)
        panels[row][0].set_ylabel("time / time of the dense model")
    for axes in panels[1]:
        axes.set_xlabel("share of active experts, K / E")
    panels[1][1].legend(frameon=False, fontsize=9, loc="lower right", title="FFN, hidden / width")
    fig.suptitle(
        "SMoE-Dropout against the dense model. Solid: as chosen; dashed: each way alone;\n"
        "dotted: 1.05; triangle: the aim for one FFN at 1/4. Bars: 95 % intervals.",
        fontsize=10,
    )
    return fig
