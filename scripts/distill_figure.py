"""The losses of a distillation over its steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURE_FILE = "distillation.png"
PANELS = {
    "labels' loss, nats": {"task": ("trained on", "#0072b2"), "eval_cross_entropy": ("held out", "#009e73")},
    "teacher's loss, weighted": {"distillation": ("", "#d55e00")},
    "factor of the labels' gradient": {"alignment_factor": ("", "#cc79a7")},
}
ONE_SWEEP = {
    "both losses, weighted": {"loss": ("", "#30363d")},
    "held-out cross-entropy, nats": {"eval_cross_entropy": ("", "#009e73")},
}
"""Where the two are never apart."""
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
    is_apart = any("task" in record for record in history)
    panels = []
    for title, curves in (PANELS if is_apart else ONE_SWEEP).items():
        found = {name: points for name in curves if len(points := _points(history, name)) >= FEWEST}
        if found:
            panels.append((title, curves, found))
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3), layout="constrained")
    for axes, (title, curves, found) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name, points in found.items():
            label, colour = curves[name]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(found) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return True


def _points(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in history if isinstance(record.get(name), float)]
