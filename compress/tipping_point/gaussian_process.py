"""A Gaussian process over next states, which keeps its uncertainty where there are no data."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.stats import invgamma

from .population import Array, Growth

LENGTH_PRIOR = (10.0, 10.0)
"""Shape and scale of the inverse gamma prior of the length scale."""
NOISE_PRIOR = (5.0, 5.0)
"""Of that of the noise."""
JITTER = 1e-9
SMALLEST = 1e-15
"""Variance; keeps the covariance regular where the amplitude is zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianProcess:
    """The posterior of a function with a squared-exponential kernel, given its hyper-parameters.

    Args:
        x: Where it was observed.
        y: What was observed.
        length: Length scale of the kernel.
        noise: Deviation of the observations.
        amplitude: Deviation of the function about its mean, before there are data; a function of x where that
            differs.
        mean: Of the function, before there are data.
        pinned: Points (x, y) that it is known to go through, without noise.

    Raises:
        ValueError: Fewer than two points (beside two pinned ones none is needed), numbers that are not
            finite, or scales that are not positive.

    Reference: Boettiger, Mangel and Munch, "Avoiding tipping points in fisheries management through
    Gaussian process dynamic programming" (2015), equations 4 to 6.
    """

    x: Array
    y: Array
    length: float
    noise: float
    amplitude: float | Growth = 1.0
    mean: float = 0.0
    pinned: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    _factor: Any = field(init=False, repr=False)
    _weights: Array = field(init=False, repr=False)
    _at: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Factorise the covariance."""
        check_points(self.x, self.y, at_least=2 if len(self.pinned) < 2 else 0)
        for name in ("length", "noise", "amplitude"):
            if not callable(value := getattr(self, name)) and not 0 < value < np.inf:
                raise ValueError(f"{name}={value} must be a positive number")
        at, targets, noises = with_pins(self.x, self.y, self.noise, self.pinned)
        covariance = self._kernel(at, at) + np.diag(noises**2 + JITTER * self._scale(at) ** 2 + SMALLEST)
        factor = cho_factor(covariance, lower=True)
        object.__setattr__(self, "_at", at)
        object.__setattr__(self, "_factor", factor)
        object.__setattr__(self, "_weights", cho_solve(factor, targets - self.mean))

    def _scale(self, points: Array) -> Array:
        return amplitudes(self.amplitude, points)

    def _kernel(self, left: Array, right: Array) -> Array:
        scaled = (left[:, None] - right) / self.length
        return self._scale(left)[:, None] * self._scale(right) * np.exp(-0.5 * scaled**2)

    def posterior(self, points: Array) -> tuple[Array, Array]:
        """Mean and variance of the function (without noise) at some points."""
        points = np.asarray(points, dtype=np.float64)
        across = self._kernel(points, self._at)
        half = solve_triangular(self._factor[0], across.T, lower=True)
        variance = self._scale(points) ** 2 - (half**2).sum(0)
        return self.mean + across @ self._weights, np.maximum(variance, 0.0)

    def draws(self, points: Array, count: int, rng: np.random.Generator) -> Array:
        """Functions drawn from the posterior, ``count`` rows of values at the points."""
        points = np.asarray(points, dtype=np.float64)
        across = self._kernel(points, self._at)
        half = solve_triangular(self._factor[0], across.T, lower=True)
        covariance = self._kernel(points, points) - half.T @ half
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        mean = self.mean + across @ self._weights
        return mean + rng.standard_normal((count, len(points))) @ root.T


def with_pins(
    x: Array, y: Array, noise: float, pinned: tuple[tuple[float, float], ...]
) -> tuple[Array, Array, Array]:
    """Observations and pinned points together, and the deviation of each."""
    pins = np.array(pinned, dtype=np.float64).reshape(-1, 2)
    at = np.concatenate([pins[:, 0], np.asarray(x, dtype=np.float64)])
    targets = np.concatenate([pins[:, 1], np.asarray(y, dtype=np.float64)])
    return at, targets, np.concatenate([np.zeros(len(pins)), np.full(len(x), noise)])


def amplitudes(amplitude: float | Growth, points: Array) -> Array:
    """At some points."""
    return amplitude(points) if callable(amplitude) else np.full(len(points), amplitude)


def check_points(x: Array, y: Array, at_least: int = 2) -> None:
    """Refuse points that no function can be learned from.

    Raises:
        ValueError: Fewer than `at_least`, unequal lengths, or numbers that are not finite.
    """
    if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
        raise ValueError(
            f"x and y have shapes {np.shape(x)} and {np.shape(y)}; they must be equally long rows"
        )
    if len(x) < at_least:
        raise ValueError(f"a function cannot be learned from {len(x)} point(s); give at least {at_least}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x or y holds NaN or infinity; every point must be finite")


class LogPosterior:
    """Log posterior of (log length, log noise), up to a constant.

    The priors are on length and noise, so the density over their logarithms has the Jacobian of that.

    Args:
        x: Where the function was observed.
        y: What was observed.
        pinned: Points without noise.
        length_prior: Shape and scale of the inverse gamma prior of the length scale.
        noise_prior: Of that of the noise.
        amplitude: As that of `GaussianProcess`.
    """

    def __init__(
        self,
        x: Array,
        y: Array,
        pinned: tuple[tuple[float, float], ...] = ((0.0, 0.0),),
        *,
        length_prior: tuple[float, float] = LENGTH_PRIOR,
        noise_prior: tuple[float, float] = NOISE_PRIOR,
        amplitude: float | Growth = 1.0,
    ) -> None:
        self.length_prior, self.noise_prior = length_prior, noise_prior
        check_points(x, y, at_least=2 if len(pinned) < 2 else 0)
        self.at, self.targets, self.is_noisy = with_pins(x, y, 1.0, pinned)
        self.squares = (self.at[:, None] - self.at) ** 2
        scale = amplitudes(amplitude, self.at)
        self.scales = scale[:, None] * scale

    def __call__(self, logs: Array) -> float:
        """At (log length, log noise)."""
        likelihood = self.likelihood(logs)
        length, noise = np.exp(logs)
        return (
            likelihood
            + _inverse_gamma(length, *self.length_prior)
            + _inverse_gamma(noise, *self.noise_prior)
            + logs.sum()
        )

    def likelihood(self, logs: Array) -> float:
        """Log marginal likelihood; minus infinity where the covariance is singular."""
        length, noise = np.exp(logs)
        covariance = self.scales * np.exp(-0.5 * self.squares / length**2)
        covariance.flat[:: len(self.at) + 1] += (
            self.is_noisy * noise**2 + JITTER * self.scales.diagonal() + SMALLEST
        )
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            return -np.inf
        half = solve_triangular(factor, self.targets, lower=True, check_finite=False)
        return float(-0.5 * half @ half - np.log(factor.diagonal()).sum())


def _inverse_gamma(value: float, shape: float, scale: float) -> float:
    """Log density up to a constant."""
    return -(shape + 1) * np.log(value) - scale / value


def sample_hyperparameters(
    log_posterior: Any,
    rng: np.random.Generator,
    *,
    iterations: int = 100_000,
    burn_in: int = 10_000,
    thin: int = 300,
    step: float = 0.25,
) -> Array:
    """Random-walk Metropolis on the logarithms of length and noise, from (1, 1).

    Args:
        log_posterior: Of the two logarithms.
        rng: Source of the walk.
        iterations: Steps of it.
        burn_in: Steps that are forgotten.
        thin: Of the others, one in so many is kept.
        step: Deviation of a step. The paper's 1.0 is refused 96 times in 100.

    Returns:
        Rows of (length, noise).

    Raises:
        ValueError: Nothing would be left.
    """
    if not 0 <= burn_in < iterations or thin < 1:
        raise ValueError(f"iterations={iterations}, burn_in={burn_in} and thin={thin} leave nothing to keep")
    steps = step * rng.standard_normal((iterations, 2))
    chances = np.log(rng.random(iterations))
    here = np.zeros(2)
    height = log_posterior(here)
    kept = []
    for number in range(iterations):
        there = here + steps[number]
        if (reached := log_posterior(there)) - height > chances[number]:
            here, height = there, reached
        if number >= burn_in and (number - burn_in) % thin == 0:
            kept.append(here)
    return np.exp(np.array(kept))


def prior_quantiles(prior: tuple[float, float], count: int) -> Array:
    """The middles of equally probable parts of an inverse gamma prior, which each weigh the same."""
    return invgamma.ppf((np.arange(count) + 0.5) / count, prior[0], scale=prior[1])


def most_likely(log_posterior: LogPosterior) -> tuple[float, float]:
    """Length and noise of the largest marginal likelihood, from several starts."""
    starts = [np.log([length, noise]) for length in (0.5, 2.0, 8.0) for noise in (0.05, 0.3)]
    found = [
        minimize(lambda q: -log_posterior.likelihood(q), start, method="Nelder-Mead") for start in starts
    ]
    length, noise = np.exp(min(found, key=lambda result: result.fun).x)
    return float(length), float(noise)
