"""What a descent until the risk of a collapse has done and reached."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..compress.gain_map import GainMap, GainStep
from ..compress.plan import CompressionPlan
from ..compress.plan_file import write_atomically
from ..compress.tipping_point.controller import Belief
from ..moe.statistics import RoutingStatistics
from .healing import Healing


@dataclass(kw_only=True)
class Cut:
    """One step: what was decided, and what came of it."""

    size: int
    """Afterwards: experts of each layer, or their rank."""
    share: float
    """Of the experts' bytes that is left."""
    risk: float
    expected: float
    reason: str
    further: str
    quality: float
    is_kept: bool
    """Whether quality stayed above the floor."""


@dataclass(kw_only=True)
class Trail:
    """All that a run has done so far, as it is kept on the disk."""

    information: float
    """Of the context, nats: the KL at which nothing of it is left."""
    whole: int
    """Size of the original."""
    kept: dict[str, list[int]]
    """By layer, the experts of the original that are left."""
    cuts: list[Cut] = field(default_factory=list)
    checkpoint: str | None = None
    """Folder of the last good state; None for the original."""
    earlier: list[list[tuple[float, float]]] = field(default_factory=list)
    """Points of earlier runs, as the store had them when this one began."""
    merging: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `apply_plan` said of the last good cut."""
    healing: Healing | None = None
    """Of the last good cut."""
    stop: str = ""
    """Why no further cut was made."""

    @property
    def size(self) -> int:
        """At present."""
        return min((cut.size for cut in self.cuts if cut.is_kept), default=self.whole)

    @property
    def points(self) -> list[tuple[float, float]]:
        """Shares kept and qualities."""
        return [(cut.share, cut.quality) for cut in self.cuts]

    @property
    def failed(self) -> int:
        """Largest size below the floor."""
        return max((cut.size for cut in self.cuts if not cut.is_kept), default=0)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "Trail":
        """What `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["cuts"] = [Cut(**cut) for cut in values["cuts"]]
        if values["healing"] is not None:
            values["healing"] = Healing(**values["healing"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Where a run has ended."""

    plan: CompressionPlan
    """From the original to what is left, without the healing."""
    statistics: RoutingStatistics
    """Of the original."""
    trail: Trail
    belief: Belief
    """At all sizes, at the end."""
    sizes: list[int]
    """All of them, the whole first."""
    labels: list[str]
    """What they are called."""
    unit: str
    """What they are."""
    num_bytes: list[int]
    """Of the model at each."""


def gain_map(reached: Reached, *, floor: float, risk: float) -> GainMap:
    """For the report.

    Args:
        reached: Where a descent has ended.
        floor: Quality that had to stay.
        risk: That was allowed.
    """
    trail, belief = reached.trail, reached.belief
    labels = dict(zip(reached.sizes, reached.labels, strict=True))
    num_bytes = dict(zip(reached.sizes, reached.num_bytes, strict=True))
    steps = [
        GainStep(
            size=labels[cut.size],
            num_bytes=num_bytes[cut.size],
            risk=cut.risk,
            expected=cut.expected,
            quality=cut.quality,
            is_kept=cut.is_kept,
            further=cut.further,
        )
        for cut in trail.cuts
    ]
    return GainMap(
        floor=floor,
        risk=risk,
        sizes=reached.sizes,
        labels=reached.labels,
        num_bytes=reached.num_bytes,
        mean=belief.mean.tolist(),
        deviation=belief.deviation.tolist(),
        crossing=belief.crossing.tolist(),
        steps=steps,
        stop=trail.stop,
        unit=reached.unit,
    )
