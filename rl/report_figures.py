"""The pictures of a report of a training: its curves in small multiples, and the entropy law."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..moe.figure_style import AFTER, BAD, INK, MUTED, plain, styled
from .entropy_law import EntropyLaw
from .report_content import Points, Row, pass_names, points

COLOURS = (AFTER, "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
COLUMNS = 3
NICE = (1, 2, 2.5, 5, 10)
"""Steps of an axis."""
MOST_POINTS = 300
"""Of a drawn line; more would make the page heavy and show no more."""
SMOOTHED_FROM = 20
"""Points from which a curve is drawn faint, with its moving mean in front."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A small picture.

    Attributes:
        title: What it shows.
        unit: Of the vertical axis.
        series: Metrics, and how each is called in the legend.
        is_share: Values are fractions in [0, 1], shown in percent.
        is_bounded: The axis is all of [0, 1].
        is_ordered: Colours show the order of the series.
    """

    title: str
    unit: str
    series: Mapping[str, str]
    is_share: bool = False
    is_bounded: bool = False
    is_ordered: bool = False

    def curves(self, history: Sequence[Row]) -> dict[str, Points]:
        """By legend, those that have two points at least."""
        found = {label: points(history, name) for name, label in self.series.items()}
        return {label: curve for label, curve in found.items() if len(curve) > 1}


SHARE: dict[str, Any] = {"is_share": True, "unit": "share"}
ALWAYS = {
    "Signs of collapse": (
        Panel(title="Policy entropy", unit="nats/token", series={"entropy": "entropy"}),
        Panel(
            title="Covariance of log-prob and advantage",
            unit="nats",
            series={"entropy_covariance": "covariance"},
        ),
        Panel(title="KL from the reference", unit="nats/token", series={"kl": "kl"}),
        Panel(
            title="Distinct completions of a prompt",
            series={"completions/distinct": "training", "eval_distinct": "held out"},
            is_bounded=True,
            **SHARE,
        ),
        Panel(
            title="Groups whose rewards are equal",
            series={"frac_reward_zero_std": "groups"},
            is_bounded=True,
            **SHARE,
        ),
    ),
    "Completions and updates": (
        Panel(
            title="Length of completions",
            unit="tokens",
            series={
                "completions/mean_length": "all",
                "completions/mean_terminated_length": "ended by themselves",
            },
        ),
        Panel(
            title="At the length limit",
            series={"completions/clipped_ratio": "training", "eval_truncated": "held out"},
            **SHARE,
        ),
        Panel(
            title="Clipped tokens",
            series={"clip_ratio/low": "below", "clip_ratio/high": "above"},
            **SHARE,
        ),
        Panel(title="KL from before the update", unit="nats/token", series={"kl_to_old": "kl"}),
        Panel(title="Gradient norm", unit="norm", series={"grad_norm": "norm"}),
    ),
    "Experts": (
        Panel(title="Router entropy", unit="nats/token", series={"router_entropy": "entropy"}),
        Panel(title="Load of the busiest expert", unit="fair shares", series={"expert_load_max": "load"}),
        Panel(title="Experts that no token chose", series={"expert_dead_share": "experts"}, **SHARE),
    ),
}
"""Panels that are the same for every run, by the heading they belong under."""


def panels(history: Sequence[Row]) -> dict[str, list[Panel]]:
    """All that may be drawn, by the heading it belongs under."""
    return {"Reward and accuracy": _rewards(history), **{name: list(found) for name, found in ALWAYS.items()}}


def _rewards(history: Sequence[Row]) -> list[Panel]:
    """Those whose curves depend on the run's reward functions and numbers of samples."""
    rewards = sorted(
        {name for row in history for name in row if name.startswith("rewards/") and name.endswith("/mean")}
    )
    by_function = {name: name.split("/", 1)[1].removesuffix("/mean") for name in rewards}
    functions = Panel(title="Reward functions", unit="reward", series=by_function)
    accuracy = Panel(
        title="Accuracy, held-out prompts",
        series={name: name.removeprefix("eval_") for name in pass_names(history)},
        is_bounded=True,
        is_ordered=True,
        **SHARE,
    )
    distinct = Panel(
        title="Different right completions of a prompt",
        unit="completions",
        series={"eval_distinct_correct": "held out"},
    )
    reward = Panel(title="Reward, training prompts", unit="reward", series={"reward": "reward"})
    return [reward, *([functions] if len(by_function) > 1 else []), accuracy, distinct]


def draw_panels(chosen: Sequence[Panel], history: Sequence[Row]) -> Figure | None:
    """Small pictures side by side; those without data are left out, ``None`` if all are."""
    found = [(panel, curves) for panel in chosen if (curves := panel.curves(history))]
    if not found:
        return None
    rows = math.ceil(len(found) / COLUMNS)
    last = max(step for _, curves in found for curve in curves.values() for step, _ in curve)
    with styled():
        figure = Figure(figsize=(10.6, 2.55 * rows), layout="constrained")
        grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for axes, (panel, curves) in zip(grid, found, strict=False):
            _draw_panel(axes, panel, curves)
            axes.set_xlim(0, last)
        for axes in grid[len(found) :]:
            axes.remove()
    return figure


def _draw_panel(axes: Axes, panel: Panel, curves: Mapping[str, Points]) -> None:
    for (label, curve), colour in zip(curves.items(), _colours(len(curves), panel.is_ordered), strict=True):
        _draw_curve(axes, curve, plain(label), colour)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=NICE))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    if panel.is_bounded:
        axes.set_ylim(-0.02, 1.02)
    elif low > 0 and low < 0.5 * high:
        axes.set_ylim(bottom=0)
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if len(curves) > 1:
        axes.legend(fontsize=8, handlelength=1.2, labelspacing=0.25, loc="best")


def _colours(count: int, is_ordered: bool) -> Sequence[str]:
    if is_ordered:  # without the ends of the map, which pages light and dark would swallow
        return [to_hex(colormaps["viridis"](place)) for place in np.linspace(0.25, 0.85, count)]
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _draw_curve(axes: Axes, curve: Points, label: str, colour: str) -> None:
    """A noisy curve faint behind its moving mean; one of few points as it is."""
    x, y = (np.array(values, dtype=float) for values in zip(*curve, strict=True))
    if len(curve) < SMOOTHED_FROM:
        axes.plot(x, y, color=colour, linewidth=1.5, marker="o", markersize=3, label=label)
        return
    axes.plot(*_thinned(x, y), color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(*_thinned(x, _smoothed(y)), color=colour, linewidth=1.6, label=label)


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a tenth of the curve; at its ends over what is there."""
    half = max(1, len(y) // 20)
    total = np.concatenate([[0.0], np.cumsum(y)])
    place = np.arange(len(y))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(y))
    return (total[last] - total[first]) / (last - first)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int)
    return x[kept], y[kept]


def draw_entropy_law(pairs: Sequence[tuple[int, float, float]], law: EntropyLaw) -> Figure:
    """Held-out accuracy over policy entropy, the fitted law and its ceiling.

    Args:
        pairs: Step, entropy (nats) and score of each evaluation.
        law: Fitted to them.
    """
    steps, entropies, scores = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    with styled():
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        x = np.linspace(0, entropies.max() * 1.05, 100)
        axes.plot(x, -law.a * np.exp(x) + law.b, color=INK, linewidth=1.2, label="R = −a exp(H) + b")
        axes.axhline(law.ceiling, color=BAD, linewidth=1, linestyle="--", label=f"ceiling {law.ceiling:.1%}")
        dots: Any = axes.scatter(entropies, scores, c=steps, cmap="viridis_r", s=26, zorder=3)
        bar = figure.colorbar(dots, ax=axes, pad=0.02)
        bar.set_label("step")
        bar.outline.set_edgecolor(MUTED)  # pyright: ignore[reportCallIssue]
        axes.set_xlim(left=0)
        low, high = min(scores.min(), law.predict(float(x[-1]))), max(scores.max(), law.ceiling)
        margin = 0.08 * (high - low) + 1e-3
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel("policy entropy H (nats/token)")
        axes.set_ylabel("pass@1, held-out prompts")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="best", fontsize=8)
    return figure
