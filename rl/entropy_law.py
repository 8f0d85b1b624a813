"""The law by which accuracy is bought with entropy, and the ceiling that it foretells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class EntropyLaw:
    """``R = -a exp(H) + b``: the score R at a mean token entropy H, nats.

    Attributes:
        a: How much is paid; positive if the score rises as entropy falls.
        b: Score at ``exp(H) = 0``.
        r_squared: Share of the scores' variance that the law explains; NaN if the scores do not vary.
        num_points: That it was fitted to.
    """

    a: float
    b: float
    r_squared: float
    num_points: int

    @property
    def ceiling(self) -> float:
        """The score when all entropy is used up, ``R(0) = -a + b``."""
        return self.b - self.a

    def predict(self, entropy: float) -> float:
        """The score at an entropy, nats."""
        return -self.a * math.exp(entropy) + self.b


def fit_entropy_law(entropies: Sequence[float], scores: Sequence[float]) -> EntropyLaw:
    """Fit the law by least squares, which is linear in ``exp(H)``.

    It describes training without terms that hold entropy up (no entropy bonus, no KL to a reference).

    Args:
        entropies: H, mean over tokens of prompts that are trained on, nats. Pairs with NaN are left out.
        scores: R of the same steps, on held-out prompts.

    Raises:
        ValueError: Lists of different lengths, fewer than three pairs, or entropies that do not vary.

    Reference: Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    eq. 6, arXiv:2505.22617.
    """
    if len(entropies) != len(scores):
        raise ValueError(f"{len(entropies)} entropies do not belong to {len(scores)} scores")
    pairs = np.array([entropies, scores], dtype=np.float64)
    x, y = pairs[:, np.isfinite(pairs).all(0)]
    if len(x) < FEWEST_POINTS:
        raise ValueError(
            f"the entropy law needs {FEWEST_POINTS} pairs of entropy and score; there are {len(x)}"
        )
    with np.errstate(over="ignore"):
        x = np.exp(x)
    if not np.isfinite(x).all() or np.ptp(x) <= 1e-9 * x.mean():
        raise ValueError("the entropies do not vary (or are absurd); no law can be fitted")
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    intercept = float(y.mean() - slope * x.mean())
    residual = y - slope * x - intercept
    r_squared = float(1 - residual @ residual / (dy @ dy)) if dy.any() else math.nan
    return EntropyLaw(a=-slope, b=intercept, r_squared=r_squared, num_points=len(x))
