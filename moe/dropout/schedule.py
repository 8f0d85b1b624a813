"""How many experts are active, as a function of training progress; nothing has a state.

Step t is the number of optimizer steps already taken: training runs through t = 0 ... T - 1, and t = T is
the trained model. Every schedule but ``random`` has k_start at t = 0 and never turns back; all have k_end at
t = T, and never leave the range between their ends.
"""

# T total steps, E experts, L layers

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KSchedule:
    """The number of active experts for every step of a training run.

    Raises:
        ValueError: A schedule that does not exist, an end that is not between 1 and E, or ``constant`` with
            two different ends.

    Reference: Chen et al., Sparse MoE as the New Dropout (ICLR 2023), arXiv:2303.01610; for ``random`` Wang
    et al., Training Matryoshka Mixture-of-Experts, arXiv:2509.26520.

    *Departs from the paper*: the release counts up to an option of its own that the user keeps equal to the
    number of steps; here the two cannot differ. Ends may be given in either order: where k_end < k_start the
    number of experts falls.
    """

    name: str
    """A key of `SCHEDULES`."""
    k_start: int
    """Active experts at the first step; for ``random`` one bound of the draws."""
    k_end: int
    """Active experts of the trained model; for ``random`` the other bound of the draws."""
    num_experts: int
    """E."""
    seed: int = 0
    """Of ``random``."""

    def __post_init__(self) -> None:
        """Check everything."""
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule={self.name!r} is not one of {', '.join(SCHEDULES)}")
        for end in ("k_start", "k_end"):
            check_active(end, getattr(self, end), self.num_experts)
        if self.name == "constant" and self.k_start != self.k_end:
            raise ValueError(
                f"schedule='constant' has one number of experts, got k_start={self.k_start} and "
                f"k_end={self.k_end}; make them equal or use schedule='linear'"
            )

    def active_experts(self, step: int, total_steps: int, num_layers: int) -> int | tuple[int, ...]:
        """Return k of one step.

        Args:
            step: Optimizer steps taken so far; from ``total_steps`` on, k is k_end.
            total_steps: T.
            num_layers: L, the number of layers that have experts.

        Returns:
            One number for all layers; for ``random`` one for each layer.

        Raises:
            ValueError: A negative step.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative; the first step of {total_steps} is 0")
        if step >= total_steps:
            return self.k_end
        return SCHEDULES[self.name](self, step, total_steps, num_layers)


def check_active(name: str, k: int, num_experts: int) -> None:
    """Refuse a number of active experts that E experts do not allow.

    Raises:
        ValueError: Not an integer between 1 and E.
    """
    if type(k) is not int or not 1 <= k <= num_experts:
        raise ValueError(f"{name}={k!r} is not between 1 and {num_experts} experts")


Schedule = Callable[[KSchedule, int, int, int], int | tuple[int, ...]]


def _constant(ends: KSchedule, step: int, total_steps: int, num_layers: int) -> int:
    """The same number at every step."""
    return ends.k_start


def _linear(ends: KSchedule, step: int, total_steps: int, num_layers: int) -> int:
    """``round((k_end - k_start) t / T) + k_start``, halves to the even number, as released."""
    return round((ends.k_end - ends.k_start) * step / total_steps) + ends.k_start


def _cosine(ends: KSchedule, step: int, total_steps: int, num_layers: int) -> int:
    """The release's quarter wave ``k_end - (k_end - k_start) cos(pi t / 2T)``: slow first, then fast."""
    return _partway(ends, 1 - math.cos(math.pi * step / (2 * total_steps)))


def _exponential(ends: KSchedule, step: int, total_steps: int, num_layers: int) -> int:
    """A gap to k_end that shrinks as ``0.99 ** (300 t / T)``: fast first, then slow.

    *Departs from the paper*: the release takes the power in 300 stairs (and divides by zero where T < 300)
    and never closes the gap, of which ``0.99 ** 300`` = 4.9% remain at t = T: from 1 to 16 it ends at 15.
    Here the curve is smooth, and stretched by 1 / 0.951 to meet k_end.
    """
    return _partway(ends, (1 - 0.99 ** (300 * step / total_steps)) / (1 - 0.99**300))


def _stepped(ends: KSchedule, step: int, total_steps: int, num_layers: int) -> int:
    """Doublings from the smaller end to the larger, each for an equal share of the steps.

    *Departs from the paper*: the release clips the fixed levels 1, 2, 4, 8, 16 to the two ends, so that from
    8 to 16 it stays at 8 for four fifths of the training.
    """
    smallest, largest = sorted((ends.k_start, ends.k_end))
    levels = [smallest]
    while levels[-1] < largest:
        levels.append(min(2 * levels[-1], largest))
    if ends.k_end < ends.k_start:
        levels.reverse()
    return levels[len(levels) * step // total_steps]


def _random(ends: KSchedule, step: int, total_steps: int, num_layers: int) -> tuple[int, ...]:
    """Each layer's own uniform draw between the ends, both included, at each step ("layer-wise").

    A draw is a hash of seed, step and layer: a resumed run goes on with the same numbers, and every rank has
    them without being told.
    """
    smallest, largest = sorted((ends.k_start, ends.k_end))
    keys = (f"{ends.seed} {step} {layer}" for layer in range(num_layers))
    draws = (int.from_bytes(hashlib.sha256(key.encode()).digest(), "big") for key in keys)
    return tuple(smallest + draw % (largest - smallest + 1) for draw in draws)


SCHEDULES: dict[str, Schedule] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "stepped": _stepped,
    "random": _random,
}
"""k at ``(ends, step, total_steps, num_layers)`` for ``0 <= step < total_steps``."""


def _partway(ends: KSchedule, fraction: float) -> int:
    return round((ends.k_end - ends.k_start) * fraction) + ends.k_start
