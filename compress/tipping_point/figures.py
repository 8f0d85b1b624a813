"""The figures of the paper: data and posterior, policies, replicates, harvests, sensitivity."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ...moe.figure_style import AFTER, BAD, BEFORE, GRID, INK, MUTED, styled
from .decision import Policy
from .gaussian_process import GaussianProcess
from .population import Array, Growth
from .simulation import Replicates

COLOURS = (INK, AFTER, BAD, "#b8860b", "#4c9a6a", "#8e6bbf", MUTED)


def posterior_figure(
    processes: Sequence[GaussianProcess], models: Mapping[str, Growth], points: Array
) -> Figure:
    """What is learned from the data: the process with its band, and parametric models.

    Args:
        processes: Draws of the Gaussian process; their mean and mixed variance are drawn.
        models: By name; the first is the truth.
        points: Escapements to draw at.
    """
    means, variances = (
        np.array(part) for part in zip(*(p.posterior(points) for p in processes), strict=True)
    )
    mean = means.mean(0)
    deviation = np.sqrt(variances.mean(0) + means.var(0))
    with styled():
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(points, points, color=GRID, linewidth=1, zorder=0)
        axes.fill_between(points, mean - 2 * deviation, mean + 2 * deviation, color=AFTER, alpha=0.15, lw=0)
        axes.plot(points, mean, color=AFTER, linewidth=2, label="Gaussian process, 2 deviations")
        for (name, growth), colour in zip(models.items(), (INK, BAD, "#b8860b", "#4c9a6a"), strict=False):
            style = "-" if name == "truth" else "--"
            axes.plot(points, growth(points), style, color=colour, linewidth=1.3, label=name)
        axes.scatter(processes[0].x, processes[0].y, s=14, color=INK, zorder=3, label="data")
        axes.set(xlabel="stock left after harvest", ylabel="stock in the next year")
        axes.set_ylim(-1, 1.25 * float(points.max()))
        axes.legend(loc="upper left", fontsize=8)
    return figure


def policy_figure(policies: Mapping[str, Policy]) -> Figure:
    """What each policy leaves, by stock."""
    with styled():
        figure = Figure(figsize=(6.6, 4.0), layout="constrained")
        axes = figure.subplots()
        for (name, policy), colour in zip(policies.items(), COLOURS, strict=False):
            is_truth = name == "truth"
            axes.plot(
                policy.grid,
                policy.escapement,
                "-" if is_truth else "--",
                color=colour,
                linewidth=3 if is_truth else 1.6,
                alpha=0.45 if is_truth else 1,
                label=name,
            )
        axes.set(xlabel="stock", ylabel="left after harvest")
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(color=GRID, linewidth=0.5)
    return figure


def replicate_figure(replicates: Mapping[str, Replicates], tipping_point: float) -> Figure:
    """Every replicate of every policy, year by year."""
    columns = 3
    rows = -(-len(replicates) // columns)
    with styled():
        figure = Figure(figsize=(9, 0.4 + 2.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, found) in zip(grid.flat, replicates.items(), strict=False):
            axes.plot(found.stocks.T, color=AFTER, linewidth=0.5, alpha=0.35)
            axes.axhline(tipping_point, color=BAD, linewidth=1, linestyle=":")
            axes.set_title(name, loc="left")
        for axes in list(grid.flat)[len(replicates) :]:
            axes.remove()
        figure.supxlabel("year", fontsize=9)
        figure.supylabel("stock", fontsize=9)
    return figure


def harvest_figure(shares: Mapping[str, Array]) -> Figure:
    """What each policy earned, as a share of what the optimum did on the same noise."""
    with styled():
        figure = Figure(figsize=(6.6, 0.8 + 0.42 * len(shares)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.boxplot(
            [np.asarray(values) for values in shares.values()],
            orientation="horizontal",
            tick_labels=list(shares),
            widths=0.55,
            showfliers=False,
            patch_artist=True,
            whis=(5, 95),
        )
        for box in drawn["boxes"]:
            box.set(facecolor=BEFORE, alpha=0.5, edgecolor=MUTED)
        for line in drawn["medians"]:
            line.set(color=INK)
        axes.invert_yaxis()
        axes.axvline(1, color=GRID, zorder=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("harvest relative to the optimum (box: half of the replicates, line: 90 %)")
    return figure


def sensitivity_figure(by_noise: Mapping[float, Array], by_point: Mapping[float, Array]) -> Figure:
    """Harvest relative to the optimum against the noise, and against where the tipping point lies."""
    with styled():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, values, label in zip(
            figure.subplots(1, 2, sharey=True),
            (by_noise, by_point),
            ("noise of the population", "tipping point"),
            strict=True,
        ):
            at = np.arange(len(values))
            means = [float(np.mean(v)) for v in values.values()]
            ends = np.array([np.quantile(v, (0.05, 0.95)) for v in values.values()]).T
            axes.errorbar(at, means, np.abs(ends - means), fmt="o", color=AFTER, capsize=3, linewidth=1)
            axes.set_xticks(at, [f"{key:g}" for key in values])
            axes.axhline(1, color=GRID, zorder=0)
            axes.set_xlabel(label)
            axes.set_ylim(0, 1.15)
        figure.supylabel("harvest relative to the optimum", fontsize=9)
    return figure
