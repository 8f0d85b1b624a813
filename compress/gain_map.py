"""The gain map: bytes against quality, what is believed of it, and what was decided on the way down."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ..moe.figure_style import AFTER, BAD, GRID, INK, MUTED, styled


@dataclass(frozen=True, kw_only=True)
class GainStep:
    """One cut."""

    size: str
    """Afterwards, in words: "9 experts", "rank 40"."""
    num_bytes: int
    """Of the model, afterwards."""
    risk: float
    """Probability of falling below the floor, as it was believed before."""
    expected: float
    """Quality that was expected."""
    quality: float
    """Quality that was measured, after healing."""
    is_kept: bool
    """Whether it stayed above the floor."""
    further: str = ""
    """The next smaller size and its risk, which was not allowed or not worth it."""


@dataclass(frozen=True, kw_only=True)
class GainMap:
    """Where a model could be cut to, as far as that is known."""

    floor: float
    """Quality that had to stay."""
    risk: float
    """Probability of falling below it that was allowed."""
    sizes: Sequence[int]
    """The original first."""
    labels: Sequence[str]
    """What they are called."""
    num_bytes: Sequence[int]
    """Of the model at each of them."""
    mean: Sequence[float]
    """Quality that is believed at each, in the end."""
    deviation: Sequence[float]
    crossing: Sequence[float]
    """Probability of lying below the floor."""
    steps: Sequence[GainStep]
    stop: str
    """Why no further cut was made."""
    unit: str
    """What the sizes are."""

    @property
    def tipping_point(self) -> int | None:
        """Place of the largest size that more probably lies below the floor than not; None if none does."""
        return next((place for place, chance in enumerate(self.crossing) if chance > 0.5), None)


def gain_figure(gains: GainMap) -> Figure:
    """Bytes against quality: the belief with its band, the cuts in their order, the floor."""
    size = np.array(gains.num_bytes) / 1e6
    mean, deviation = np.array(gains.mean), np.array(gains.deviation)
    with styled():
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.subplots()
        high = np.minimum(mean + 2 * deviation, 1)  # there is no more to keep
        axes.fill_between(size, mean - 2 * deviation, high, color=AFTER, alpha=0.14, lw=0)
        axes.plot(size, mean, color=AFTER, linewidth=1.6, label="believed, with 2 deviations")
        axes.axhline(gains.floor, color=BAD, linestyle="--", linewidth=1, label=f"floor {gains.floor:g}")
        kept = [step for step in gains.steps if step.is_kept]
        lost = [step for step in gains.steps if not step.is_kept]
        for steps, marker, colour, label in ((kept, "o", INK, "kept"), (lost, "X", BAD, "taken back")):
            if steps:
                at = [step.num_bytes / 1e6 for step in steps]
                axes.scatter(
                    at,
                    [step.quality for step in steps],
                    marker=marker,
                    color=colour,
                    s=34,
                    zorder=3,
                    label=label,
                )
        for number, step in enumerate(gains.steps, 1):
            place = (step.num_bytes / 1e6, step.quality)
            axes.annotate(str(number), place, (0, 7), textcoords="offset points", ha="center", fontsize=8)
        if (point := gains.tipping_point) is not None:
            place = size[point]
            axes.axvspan(size.min(), place, color=BAD, alpha=0.06, lw=0)
            axes.annotate(
                f"tipping point\nprobably at\n{gains.labels[point]}",
                (place, 1),
                (-6, -8),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
                color=BAD,
            )
        lowest = min([step.quality for step in gains.steps] + [gains.floor])
        axes.set_ylim(max(-0.05, lowest - 0.25), 1.06)
        above = axes.secondary_xaxis("top")
        shown = range(0, len(size), max(1, len(size) // 8))
        above.set_xticks(size[list(shown)], [str(gains.sizes[index]) for index in shown])
        above.set_xlabel(gains.unit, color=MUTED)
        axes.set(xlabel="weights, MB", ylabel="quality (1: all that the context tells)")
        axes.grid(color=GRID, linewidth=0.5)
        axes.legend(loc="lower right", fontsize=8)
    return figure
