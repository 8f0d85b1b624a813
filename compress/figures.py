"""The pictures of a compression report, as matplotlib figures: load, groups, size, fidelity.

Every function is pure: data in, a `Figure` out; `moe/figure_style.py` turns it into PNG or SVG.
"""

# Dimensions: layers L, experts E.

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..moe.figure_style import AFTER, BEFORE, GRID, INK, MUTED, plain, styled
from .dendrogram import ALONE, GROUP_COLOURS, REMOVED, Tree, colour_indices, leaf_order, link_colour
from .report_content import DomainRow, Interval, LayerReport

_FAIR_SHARES = 3.0  # the colour scale of the heat map ends here
_TOO_LARGE = 1e6  # a ruined model's perplexity can reach numbers that no axis holds


def short_names(names: Sequence[str]) -> list[str]:
    """Drop the dotted parts that all names share at their start and end; one name alone stays as it is."""
    parts = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return list(names)
    shortest = min(len(p) for p in parts)
    start = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({p[-1 - i] for p in parts}) > 1), shortest - start)
    return [".".join(p[start : len(p) - end]) or name for p, name in zip(parts, names, strict=True)]


def load_heatmap(layers: Sequence[LayerReport]) -> Figure:
    """Load of every expert in every layer, and how many experts each layer keeps.

    Colour is the expert's share of the layer's selections in units of the fair share 1/E (1 = balanced), cut
    at 3. A cross marks a dead expert, a dot one that saw too few tokens to be judged.
    """
    load_LE = np.full((len(layers), max(layer.num_experts for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        load_LE[row, : layer.num_experts] = np.asarray(layer.usage, dtype=float) * layer.num_experts
    with styled():
        figure = Figure(figsize=(10, 1.5 + min(max(0.19 * len(layers), 0.9), 36)), layout="constrained")
        heat, kept = figure.subplots(1, 2, width_ratios=(5, 1), sharey=True)
        scale = {"cmap": "cividis", "vmin": 0, "vmax": _FAIR_SHARES}
        image = heat.imshow(load_LE, aspect="auto", interpolation="none", **scale)
        _mark_experts(heat, layers)
        _layer_axis(heat, layers)
        heat.set_xlabel("expert")
        heat.xaxis.set_major_locator(MaxNLocator(integer=True))
        place = {"location": "top", "shrink": 0.5, "aspect": 40, "pad": 0.01}
        colourbar = figure.colorbar(image, ax=heat, extend="max", **place)
        colourbar.set_label("load, in fair shares (1 = balanced)", fontsize=8)
        colourbar.ax.tick_params(labelsize=8)
        _kept_bars(kept, layers)
    return figure


def _mark_experts(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """A cross on dead experts, a dot on those judged on too little, and a legend if there are any."""
    for marks, marker, label in (("dead", "x", "dead"), ("too_few", ".", "too few tokens to judge")):
        places = [
            (expert, row)
            for row, layer in enumerate(layers)
            for expert in getattr(layer, marks)
            if marks == "dead" or expert not in layer.dead
        ]
        if places:
            x, y = zip(*places, strict=True)
            axes.plot(x, y, marker, color="#ffffff", markersize=4, markeredgewidth=1, label=label)
    if axes.lines:
        legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, borderaxespad=0.2)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_markeredgecolor(MUTED)  # pyright: ignore[reportAttributeAccessIssue]


def _layer_axis(axes: Axes, layers: Sequence[LayerReport]) -> None:
    every = math.ceil(len(layers) / 190)  # 36 inches hold this many labels
    labels = [plain(name) for name in short_names([layer.name for layer in layers])]
    axes.set_yticks(range(0, len(layers), every), labels[::every], fontsize=8)
    axes.set_ylabel("layer")


def _kept_bars(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """Bars of the experts before and, in front of them, after."""
    rows = range(len(layers))
    axes.barh(rows, [layer.num_experts for layer in layers], color=BEFORE, height=0.75, label="before")
    axes.barh(rows, [layer.num_kept for layer in layers], color=AFTER, height=0.75, label="after")
    for row, layer in zip(rows, layers, strict=True):
        axes.text(layer.num_experts * 1.04, row, str(layer.num_kept), va="center", fontsize=7.5, color=INK)
    axes.tick_params(labelleft=False, left=False)
    axes.set_xlim(0, max(layer.num_experts for layer in layers) * 1.2)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("experts kept")


def group_dendrogram(layer: LayerReport, tree: Tree | None) -> Figure:
    """Tree of a layer's experts by similarity (average linkage) over the load of each, coloured by group.

    Args:
        layer: the layer.
        tree: its tree, from `layer_tree`; None draws the load alone, group by group.
    """
    order = leaf_order(layer, tree)
    colours = colour_indices(layer, order)
    palette = dict(enumerate(GROUP_COLOURS)) | {ALONE: MUTED, REMOVED: GRID}
    width, height = max(6.0, min(0.12 * len(order), 60)), 4.2 if tree is not None else 2.4
    with styled():
        figure = Figure(figsize=(width, height))
        # Set by hand: the automatic layout measures every label, which takes longer than all the drawing.
        left, right, bottom, top = 0.78 / width, 1 - 0.1 / width, 0.62 / height, 1 - 0.35 / height
        middle = bottom + (top - bottom) * (0.3 if tree is not None else 1)
        bars = figure.add_axes((left, bottom, right - left, middle - bottom))
        _draw_load(bars, layer, [(expert, palette[colours[expert]]) for expert in order])
        upper = bars
        if tree is not None:
            upper = figure.add_axes(
                (left, middle + 0.12 / height, right - left, top - middle - 0.12 / height)
            )
            _draw_tree(upper, layer, tree, colours, palette)
        upper.set_title(f"{plain(layer.name)}: {layer.num_experts} experts, {layer.num_kept} kept")
    return figure


def _draw_load(axes: Axes, layer: LayerReport, experts: Sequence[tuple[int, str]]) -> None:
    """A bar for each expert (number, colour) from left to right, and a dashed line at the fair share."""
    usage = [layer.usage[expert] for expert, _ in experts]
    outlines = [[(x - 0.4, 0), (x - 0.4, y), (x + 0.4, y), (x + 0.4, 0)] for x, y in enumerate(usage)]
    axes.add_collection(PolyCollection(outlines, facecolors=[colour for _, colour in experts]))
    axes.axhline(1 / layer.num_experts, color=INK, linewidth=0.8, linestyle="--")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("load")
    axes.set_xlim(-0.7, len(experts) - 0.3)
    axes.set_ylim(0, max(*usage, 1 / layer.num_experts) * 1.08)
    axes.set_xticks([])
    # Plain texts: a tick is five artists, and a layer may have hundreds of experts.
    size, rotation = (6, 90) if len(experts) > 40 else (8, 0)
    below = axes.get_xaxis_transform()
    for x, (expert, _) in enumerate(experts):
        axes.text(x, -0.04, str(expert), transform=below, size=size, rotation=rotation, ha="center", va="top")
    axes.set_xlabel("expert (colour: group; grey: alone; pale: removed; dashed: fair share)", labelpad=22)


def _draw_tree(
    axes: Axes, layer: LayerReport, tree: Tree, colours: dict[int, int], palette: dict[int, str]
) -> None:
    brackets = [
        [link.left, (link.left[0], link.height), (link.right[0], link.height), link.right]
        for link in tree.links
    ]
    line_colours = [palette[link_colour(layer, link, colours)] for link in tree.links]
    axes.add_collection(LineCollection(brackets, colors=line_colours, linewidths=1.3))
    axes.set_xlim(-0.7, len(tree.order) - 0.3)
    axes.set_ylim(0, max(tree.links[-1].height, 1e-12) * 1.05)
    axes.set_ylabel("1 − similarity")
    axes.set_xticks([])


def size_bars(bytes_by_part: Mapping[str, tuple[int, int]]) -> Figure:
    """Bytes of each part of the model before and after, largest first."""
    parts = sorted(bytes_by_part.items(), key=lambda entry: -max(entry[1]))
    unit, scale = _byte_unit(max((max(pair) for _, pair in parts), default=1))
    with styled():
        figure = Figure(figsize=(10, 1.0 + 0.55 * max(len(parts), 1)), layout="constrained")
        axes = figure.subplots()
        for side, (offset, colour, label) in enumerate(((-0.2, BEFORE, "before"), (0.2, AFTER, "after"))):
            values = [pair[side] / scale for _, pair in parts]
            rows = [row + offset for row in range(len(parts))]
            drawn = axes.barh(rows, values, 0.38, color=colour, label=label)
            axes.bar_label(drawn, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(parts)), [plain(part) for part, _ in parts])
        axes.invert_yaxis()
        axes.set_xlabel(f"size on disk ({unit})")
        axes.margins(x=0.1)
        axes.legend(loc="lower right")
    return figure


def _byte_unit(most: int | float) -> tuple[str, float]:
    """Decimal unit that keeps the largest number at 1 or more."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if most >= scale:
            return unit, scale
    return "bytes", 1.0


def fidelity_bars(domains: Sequence[DomainRow], overall: DomainRow | None = None) -> Figure:
    """Change of perplexity, KL divergence and top-1 agreement for each domain, with 95% intervals.

    Numbers that are not finite, or beyond a million, are left out of the picture (the table has them).
    """
    rows = [*domains, *([overall] if overall is not None else [])]
    with styled():
        figure = Figure(figsize=(10, 1.1 + 0.34 * max(len(rows), 2)), layout="constrained")
        change, kl, top1 = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.06})
        _range_bars(
            change,
            [row.perplexity_change for row in rows],
            [row.perplexity_change_interval for row in rows],
            rows,
            overall,
        )
        change.set_xlabel("change of perplexity")
        change.xaxis.set_major_locator(MaxNLocator(5))
        change.xaxis.set_major_formatter(PercentFormatter(1))
        _range_bars(kl, [row.kl for row in rows], [row.kl_interval for row in rows], rows, overall)
        kl.xaxis.set_major_locator(MaxNLocator(5))
        kl.set_xlabel("KL from the original (nats/token)")
        _range_bars(
            top1,
            [row.top1_agreement for row in rows],
            [row.top1_agreement_interval for row in rows],
            rows,
            overall,
        )
        top1.set_xlabel("same top-1 token")
        top1.set_xlim(0, 1)
        top1.xaxis.set_major_formatter(PercentFormatter(1))
        change.set_yticks(range(len(rows)), [plain(row.domain) for row in rows])
        change.invert_yaxis()
    return figure


def _range_bars(
    axes: Axes,
    values: Sequence[float],
    intervals: Sequence[Interval | None],
    rows: Sequence[DomainRow],
    overall: DomainRow | None,
) -> None:
    """Horizontal bars with whiskers; the row of all domains is grey."""
    shown = [value if abs(value) < _TOO_LARGE else math.nan for value in values]
    axes.barh(range(len(rows)), shown, 0.62, color=[BEFORE if row is overall else AFTER for row in rows])
    for position, (value, interval) in enumerate(zip(shown, intervals, strict=True)):
        if interval is not None and all(abs(number) < _TOO_LARGE for number in (*interval, value)):
            axes.plot(interval, (position, position), color=INK, linewidth=1.2, marker="|", markersize=5)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
