"""The losses of a distillation over its steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURE_FILE = "distillation.png"
CURVES = {
    "loss": ("whole loss", "#30363d"),
    "task": ("labels", "#0072b2"),
    "distillation": ("teacher", "#d55e00"),
    "eval_cross_entropy": ("held-out cross-entropy", "#009e73"),
}
"""Logged numbers that are drawn: legend and colour."""
FEWEST = 2
"""Points of a curve."""


def draw_history(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw what Trainer logged.

    Args:
        history: Its records.
        path: A .png file.

    Returns:
        Whether there was enough to draw.
    """
    curves = {}
    for name in CURVES:
        points = [(row["step"], row[name]) for row in history if isinstance(row.get(name), float)]
        if len(points) >= FEWEST:
            curves[name] = tuple(zip(*points, strict=True))
    factors = [(row["step"], row["alignment_factor"]) for row in history if "alignment_factor" in row]
    if "task" not in curves:
        curves = {name: curve for name, curve in curves.items() if name not in ("task", "distillation")}
    if not curves:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if len(factors) >= FEWEST else 1, squeeze=False)[0]
    for name, (steps, values) in curves.items():
        label, colour = CURVES[name]
        axes[0].plot(steps, values, label=label, color=colour, linewidth=1.6)
    axes[0].set(xlabel="step", ylabel="loss, nats", ylim=(0, None))
    axes[0].legend(frameon=False)
    if len(factors) >= FEWEST:
        axes[1].plot(*zip(*factors, strict=True), color="#cc79a7", linewidth=1.6)
        axes[1].set(xlabel="step", ylabel="factor of the labels' gradient")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=130)
    return True
