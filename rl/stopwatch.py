"""How long the parts of a step take."""

import time


class Stopwatch:
    """Seconds of laps, by name.

    Attributes:
        laps: In the order in which they ended.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap, and begin the next."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """Of all laps."""
        return sum(self.laps.values())
