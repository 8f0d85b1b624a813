"""How far to compress: the next cut that saves most while the risk of a collapse stays small.

Compressing is harvesting: a cut takes experts, healing lets quality grow back, and beyond some point it does
not come back. What is kept (a share of the experts) is the escapement, quality after healing the next stock.
A Gaussian process learns quality by what is kept from the cuts made so far; where there are none it is
uncertain, so it does not promise anything there. Dynamic programming over the cuts to come chooses the next.
"""

# N nodes of hyper-parameters, S sizes

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from .gaussian_process import GaussianProcess, LogPosterior, prior_quantiles
from .population import Array, Growth

DEVIATION = 0.35
"""Of quality about what is expected of it, before there are data, in shares of the experts taken: with an
eighth of them gone it may lie 0.09 lower than that, by two deviations."""
LENGTH_PRIOR = (6.0, 1.75)
"""Inverse gamma; mean 0.35 of the experts."""
NOISE_PRIOR = (5.0, 0.06)
"""Inverse gamma; mean 0.015 of quality."""
LENGTHS, NOISES = 24, 12
"""Nodes over which the hyper-parameters are averaged, by quantiles of their priors."""
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

    size: int | None
    """Of the next cut; None to stop."""
    risk: float
    """Probability that it falls below the floor; of the smallest cut when it is to stop."""
    expected: float
    """Quality that is expected of it."""
    reason: str
    """In words."""
    further: str = ""
    """The next smaller size, and the probability that it falls below the floor."""


def believe(
    points: Sequence[tuple[float, float]],
    kept: Array,
    floor: float,
    *,
    before: Growth | None = None,
) -> Belief:
    """Learn quality by what is kept.

    The hyper-parameters are averaged over a grid of them, not over a walk, so that no seed decides.

    Args:
        points: Shares kept and qualities measured, in (0, 1] and at most 1; none is the belief before data.
        kept: Shares to believe something of.
        floor: Lowest quality that is wanted.
        before: Quality by share kept as it is expected before there are data, such as `curve_of_runs`; by
            default ``1 - (1 - kept)^2``, because the first experts are the cheapest.

    Raises:
        ValueError: Points, shares or a floor that are not finite or out of range.
    """
    at, found = _checked(points)
    shares = np.asarray(kept, dtype=np.float64)
    if shares.ndim != 1 or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"kept={shares.tolist()} must be a row of shares from 0 to 1")
    if not np.isfinite(floor):
        raise ValueError(f"floor={floor} must be a finite quality")
    prior = before or _first_are_cheap
    residual = found - prior(at)
    lengths, noises, weights_N = _hyperparameters(at, residual)
    mean_NS, variance_NS = np.empty((2, len(weights_N), len(shares)))
    for node, (length, noise) in enumerate(zip(lengths, noises, strict=True)):
        process = GaussianProcess(
            x=at, y=residual, length=length, noise=noise, amplitude=_deviation, pinned=ENDS
        )
        mean, variance = process.posterior(shares)
        mean_NS[node], variance_NS[node] = prior(shares) + mean, variance + noise**2
    average = weights_N @ mean_NS
    return Belief(
        kept=shares,
        mean=average,
        deviation=np.sqrt(weights_N @ (variance_NS + (mean_NS - average) ** 2)),
        crossing=weights_N @ ndtr((floor - mean_NS) / np.sqrt(variance_NS)),
    )


def decide(
    sizes: Sequence[int],
    belief: Belief,
    *,
    risk: float,
    whole: int,
    failed: int = 0,
    told: Callable[[int], str] = "{} experts".format,
) -> Decision:
    """Choose the next cut.

    A cut is allowed if the probability that quality falls below the floor is at most `risk`. Of all ways down
    through allowed cuts, the one that is expected to save most is chosen: a cut that falls below the floor
    saves nothing and ends the run, any cut costs as much as `STEP_COST` of the whole.

    Args:
        sizes: Numbers of experts, or what else is cut, the present one first, then smaller ones.
        belief: Of each of them.
        risk: In [0, 1].
        whole: Size of the original.
        failed: Largest size that is known to lie below the floor.
        told: A size in words.

    Raises:
        ValueError: A risk outside [0, 1], or sizes that do not fall from at most the whole.
    """
    order = list(sizes)
    if not order or order != sorted(set(order), reverse=True) or not 1 <= order[-1] <= order[0] <= whole:
        raise ValueError(f"sizes={order} must fall, from at most whole={whole} to at least 1")
    if len(belief.crossing) != len(order):
        raise ValueError(f"the belief is of {len(belief.crossing)} sizes, but {len(order)} are given")
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
        reason = f"{told(sizes[chosen])}: {expected:.3f} expected, below the floor with {chance:.1%}"
        further = ""
        if chosen + 1 < len(sizes):
            further = f"{told(sizes[chosen + 1])}: {belief.crossing[chosen + 1]:.1%}"
            reason += f" ({further})"
        return Decision(size=sizes[chosen], risk=chance, expected=expected, reason=reason, further=further)
    return _stopped(sizes, belief, risk, failed, told)


def _stopped(
    sizes: Sequence[int], belief: Belief, risk: float, failed: int, told: Callable[[int], str]
) -> Decision:
    if len(sizes) < 2:
        return Decision(
            size=None, risk=0.0, expected=float(belief.mean[0]), reason="nothing smaller is possible"
        )
    chance, expected = float(belief.crossing[1]), float(belief.mean[1])
    why = (
        f"{told(sizes[1])}: tried, and below the floor"
        if sizes[1] <= failed
        else f"{told(sizes[1])}: below the floor with {chance:.1%}, more than {risk:.1%}"
    )
    if sizes[1] > failed and chance <= risk and risk > 0:
        why = "no cut would save more than it costs"
    return Decision(size=None, risk=chance, expected=expected, reason=why)


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


def _deviation(kept: Array) -> Array:
    return DEVIATION * (1 - kept)


def _hyperparameters(at: Array, residual: Array) -> tuple[Array, Array, Array]:
    """Nodes of length and noise, and what each weighs: under the prior all the same."""
    target = LogPosterior(at, residual, ENDS, amplitude=_deviation)
    pairs = np.meshgrid(prior_quantiles(LENGTH_PRIOR, LENGTHS), prior_quantiles(NOISE_PRIOR, NOISES))
    lengths, noises = (values.ravel() for values in pairs)
    heights = np.array([target.likelihood(logs) for logs in np.log([lengths, noises]).T])
    weights = np.exp(heights - heights.max())
    return lengths, noises, weights / weights.sum()


def _checked(points: Sequence[tuple[float, float]]) -> tuple[Array, Array]:
    pairs = np.array(points, dtype=np.float64)
    pairs = pairs.reshape(0, 2) if not pairs.size else pairs
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"points have shape {pairs.shape}; they must be pairs of a share and a quality")
    if not np.isfinite(pairs).all() or (pairs[:, 0] <= 0).any() or (pairs > 1).any():
        raise ValueError(f"points {pairs.tolist()} must be shares kept in (0, 1] and qualities of at most 1")
    inside = pairs[:, 0] < 1  # everything has all quality, without error
    return pairs[inside, 0], pairs[inside, 1]
