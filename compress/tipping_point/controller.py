"""How far to compress: the next cut that saves most while the risk of a collapse stays small.

Compressing is harvesting: a cut takes experts, healing lets quality grow back, and beyond some point it does
not come back. What is kept (a share of the experts) is the escapement, quality after healing the next stock.
A Gaussian process learns quality by what is kept from the cuts made so far; where there are none it is
uncertain, so it does not promise anything there. Dynamic programming over the cuts to come chooses the next.
"""

# L sizes that the model may have, from the present one down

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from .gaussian_process import GaussianProcess, LogPosterior, sample_hyperparameters
from .population import Array, Growth

SCALE = 0.3
"""Deviation of quality about what is expected of it, before there are data."""
LENGTH_PRIOR = (6.0, 1.75)
"""Inverse gamma; mean 0.35 of the experts."""
NOISE_PRIOR = (5.0, 0.2)
"""Inverse gamma, in units of SCALE; mean 0.05."""
ITERATIONS, BURN_IN, THIN = 4000, 1000, 100
STEP_COST = 0.01
"""Of a cut, in shares of the experts that it would have to save to be worth making."""
ENDS = ((0.0, 0.0), (1.0, 0.0))
"""Where nothing is kept and where everything is, quality is what is expected, without error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Belief:
    """What is believed of the quality at some sizes."""

    kept: Array
    """Shares of the experts."""
    mean: Array
    deviation: Array
    """Of a measurement, noise included."""
    crossing: Array
    """Probability that a measurement would lie below the floor."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do next, and why."""

    experts: int | None
    """Size of the next cut; None to stop."""
    risk: float
    """Probability that it falls below the floor; of the smallest cut when it is to stop."""
    expected: float
    """Quality that is expected of it."""
    reason: str
    """In words."""


def believe(
    points: Sequence[tuple[float, float]],
    kept: Array,
    floor: float,
    *,
    seed: int = 0,
    before: Growth | None = None,
) -> Belief:
    """Learn quality by what is kept.

    Args:
        points: Shares kept and qualities measured, in [0, 1] and at most 1.
        kept: Shares to believe something of.
        floor: Lowest quality that is wanted.
        seed: Of the walk over hyper-parameters.
        before: Quality by share kept as it is expected before there are data, such as `curve_of_runs`; by
            default ``1 - (1 - kept)^2``, because the first experts are the cheapest.

    Raises:
        ValueError: Points that are not finite or out of range.
    """
    at, found = _checked(points)
    shares = np.asarray(kept, dtype=np.float64)
    prior = before or _first_are_cheap
    residual = (found - prior(at)) / SCALE
    means, variances = [], []
    for length, noise in _hyperparameters(at, residual, seed):
        if len(at) >= 2:
            process = GaussianProcess(x=at, y=residual, length=length, noise=noise, pinned=ENDS)
        else:  # the ends alone, as points of their own
            process = GaussianProcess(
                x=np.array([0.0, 1.0]),
                y=np.zeros(2),
                length=length,
                noise=1e-3,
                pinned=tuple(zip(at, residual, strict=True)),
            )
        mean, variance = process.posterior(shares)
        means.append(prior(shares) + SCALE * mean)
        variances.append(SCALE**2 * (variance + noise**2))
    mean_SL, variance_SL = np.array(means), np.array(variances)
    crossing = ndtr((floor - mean_SL) / np.sqrt(variance_SL)).mean(0)
    deviation = np.sqrt(variance_SL.mean(0) + mean_SL.var(0))
    return Belief(kept=shares, mean=mean_SL.mean(0), deviation=deviation, crossing=crossing)


def decide(
    sizes: Sequence[int],
    belief: Belief,
    *,
    risk: float,
    whole: int,
    failed: int = 0,
) -> Decision:
    """Choose the next cut.

    A cut is allowed if the probability that quality falls below the floor is at most `risk`. Of all ways down
    through allowed cuts, the one that is expected to save most is chosen: a cut that falls below the floor
    saves nothing and ends the run, any cut costs as much as `STEP_COST` of the experts.

    Args:
        sizes: Numbers of experts, the present one first, then smaller ones.
        belief: Of each of them.
        risk: In [0, 1].
        whole: Experts of the original.
        failed: Largest size that is known to lie below the floor.

    Raises:
        ValueError: A risk outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk={risk} is not a probability between 0 and 1")
    allowed = [
        size > failed and chance <= risk and risk > 0
        for size, chance in zip(sizes, belief.crossing, strict=True)
    ]
    worth, follow = np.zeros(len(sizes)), [0] * len(sizes)
    for here in reversed(range(len(sizes))):
        for there in range(here + 1, len(sizes)):
            if not allowed[there]:
                continue
            saved = (sizes[here] - sizes[there]) / whole
            gain = (1 - belief.crossing[there]) * (saved + worth[there]) - STEP_COST
            if gain > worth[here]:
                worth[here], follow[here] = gain, there
    if follow[0]:
        chosen = follow[0]
        chance, expected = float(belief.crossing[chosen]), float(belief.mean[chosen])
        return Decision(
            experts=sizes[chosen],
            risk=chance,
            expected=expected,
            reason=f"{sizes[chosen]} experts: {expected:.3f} expected, below the floor with {chance:.1%}",
        )
    return _stopped(sizes, belief, risk, failed)


def _stopped(sizes: Sequence[int], belief: Belief, risk: float, failed: int) -> Decision:
    if len(sizes) < 2:
        return Decision(
            experts=None, risk=0.0, expected=float(belief.mean[0]), reason="no fewer are possible"
        )
    chance, expected = float(belief.crossing[1]), float(belief.mean[1])
    why = (
        f"{sizes[1]} experts were tried and fell below the floor"
        if sizes[1] <= failed
        else f"{sizes[1]} experts would fall below the floor with {chance:.1%}, more than {risk:.1%}"
    )
    if sizes[1] > failed and chance <= risk and risk > 0:
        why = "no cut would save more than it costs"
    return Decision(experts=None, risk=chance, expected=expected, reason=why)


def curve_of_runs(runs: Sequence[Mapping[float, float]]) -> Growth | None:
    """Mean quality of earlier runs by the share kept; None without runs."""
    if not runs:
        return None
    curves = [_checked(sorted(run.items())) for run in runs]

    def mean(kept: Array) -> Array:
        found = [np.interp(kept, np.r_[0, at, 1], np.r_[0, quality, 1]) for at, quality in curves]
        return np.mean(found, axis=0)

    return mean


def _first_are_cheap(kept: Array) -> Array:
    return 1 - (1 - kept) ** 2


def _hyperparameters(at: Array, residual: Array, seed: int) -> Array:
    x, y = (at, residual) if len(at) >= 2 else (np.array([0.0, 1.0]), np.zeros(2))
    pinned = ENDS if len(at) >= 2 else ()
    target = LogPosterior(x, y, pinned, length_prior=LENGTH_PRIOR, noise_prior=NOISE_PRIOR)
    rng = np.random.default_rng(seed)
    return sample_hyperparameters(target, rng, iterations=ITERATIONS, burn_in=BURN_IN, thin=THIN)


def _checked(points: Sequence[tuple[float, float]]) -> tuple[Array, Array]:
    pairs = np.array(points, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(pairs).all() or (pairs[:, 0] <= 0).any() or (pairs > 1).any():
        raise ValueError(f"points {pairs.tolist()} must be shares kept in (0, 1] and qualities of at most 1")
    inside = pairs[:, 0] < 1  # everything has all quality, without error
    return pairs[inside, 0], pairs[inside, 1]
