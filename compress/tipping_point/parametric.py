"""Parametric models fitted to a series of stocks, by maximum likelihood and by their posterior."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from .population import Allen, Array, Growth, Myers, Ricker, check_stocks


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model and the uniform priors of its parameters."""

    make: Callable[..., Growth]
    bounds: dict[str, tuple[float, float]]
    """By name of the parameter, as in the paper's supplement."""


NOISE_BOUNDS = (1e-6, 100.0)
"""Of the deviation of the logarithm, in every model."""
FAMILIES = {
    "Allen": Family(make=Allen, bounds={"r": (0.01, 6.0), "K": (0.01, 20.0), "C": (0.01, 20.0)}),
    "Ricker": Family(make=Ricker, bounds={"r": (0.01, 20.0), "K": (0.01, 40.0)}),
    "Myers": Family(make=Myers, bounds={"r": (1e-4, 10.0), "theta": (1e-4, 10.0), "K": (1e-4, 40.0)}),
}
STARTS = 12
"""Of the search for the maximum, drawn from the priors beside the middle of each."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted model."""

    family: str
    parameters: dict[str, float]
    noise: float
    log_likelihood: float
    num_points: int

    @property
    def growth(self) -> Growth:
        """The model."""
        return FAMILIES[self.family].make(**self.parameters)

    @property
    def aic(self) -> float:
        """Akaike's criterion; the noise counts as a parameter."""
        return 2 * (len(self.parameters) + 1) - 2 * self.log_likelihood

    @property
    def bic(self) -> float:
        """The Bayesian criterion."""
        return (len(self.parameters) + 1) * np.log(self.num_points) - 2 * self.log_likelihood


def log_likelihood(growth: Growth, noise: float, series: Array) -> float:
    """Of a series: ``log x' ~ N(log f(x), noise)``, with the density on the scale of stocks."""
    expected, found = growth(series[:-1]), series[1:]
    if not (expected > 0).all() or not (found > 0).all():
        return -np.inf
    deviations = (np.log(found) - np.log(expected)) / noise
    constant = len(found) * (np.log(noise) + 0.5 * np.log(2 * np.pi))
    return float(-0.5 * deviations @ deviations - constant - np.log(found).sum())


def fit(family: str, series: Array, *, seed: int = 0) -> Fit:
    """The parameters of the largest likelihood within the priors.

    Args:
        family: A key of ``FAMILIES``.
        series: Stocks year by year, nobody harvesting.
        seed: Of the starts of the search.

    Raises:
        ValueError: An unknown family, or a series that is none.

    *Departs from the paper*: its code maximises the sum of the densities, not of their logarithms.
    """
    series = _checked(series)
    names, make, bounds = _family(family)
    limits = [*bounds, (1e-3, 1.0)]

    def loss(values: Array) -> float:
        with np.errstate(all="ignore"):
            found = log_likelihood(make(**dict(zip(names, values[:-1], strict=True))), values[-1], series)
        return -found if np.isfinite(found) else 1e10

    rng = np.random.default_rng(seed)
    low, high = np.array(limits).T
    largest = float(series.max())
    starts = [low + (high - low) * rng.random(len(limits)) for _ in range(STARTS)]
    starts.append(
        np.array([{"r": 1.0, "K": largest, "C": largest / 2, "theta": 1.0}[n] for n in names] + [0.1])
    )
    found: list[Any] = []
    for start in starts:
        rough = minimize(
            loss, start, method="Nelder-Mead", bounds=limits, options={"maxiter": 4000, "maxfev": 4000}
        )
        found.append(minimize(loss, rough.x, method="L-BFGS-B", bounds=limits))
        found.append(rough)
    best = min(found, key=lambda result: result.fun)
    return Fit(
        family=family,
        parameters=dict(zip(names, map(float, best.x[:-1]), strict=True)),
        noise=float(best.x[-1]),
        log_likelihood=-float(best.fun),
        num_points=len(series) - 1,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """Draws of a model's parameters and noise."""

    family: str
    draws: Array
    """Rows of the parameters, the noise last."""
    dic: float
    """Deviance information criterion, with half the variance of the deviance as the number of parameters: the
    deviance at the mean of the draws, which the paper's has, means nothing for Myers' model."""

    def models(self, count: int) -> list[tuple[Growth, float]]:
        """Evenly spaced draws, as `model_transitions` takes them."""
        names, make, _ = _family(self.family)
        rows = self.draws[np.linspace(0, len(self.draws) - 1, count).astype(int)]
        return [(make(**dict(zip(names, row[:-1], strict=True))), float(row[-1])) for row in rows]


def sample(
    family: str, series: Array, rng: np.random.Generator, *, iterations: int = 40_000, burn_in: int = 10_000
) -> Posterior:
    """Random-walk Metropolis under uniform priors, with steps that adapt to the draws until the burn-in ends.

    Args:
        family: A key of ``FAMILIES``.
        series: Stocks year by year.
        rng: Source of the walk.
        iterations: Steps of it; the paper has a million, in six chains.
        burn_in: Steps that are forgotten.
    """
    series = _checked(series)
    names, make, bounds = _family(family)
    low, high = np.array([*bounds, NOISE_BOUNDS]).T

    def height(values: Array) -> float:
        if ((values < low) | (values > high)).any():
            return -np.inf
        return log_likelihood(make(**dict(zip(names, values[:-1], strict=True))), values[-1], series)

    best = fit(family, series)
    here = np.clip(np.array([*best.parameters.values(), best.noise]), low + 1e-9, high - 1e-9)
    reached, root = height(here), np.diag(0.05 * np.maximum(here, 0.01))
    walked = np.empty((iterations, len(here)))
    heights = np.empty(iterations)
    steps, chances = rng.standard_normal((iterations, len(here))), np.log(rng.random(iterations))
    for number in range(iterations):
        there = here + root @ steps[number]
        if (found := height(there)) - reached > chances[number]:
            here, reached = there, found
        walked[number], heights[number] = here, reached
        if number < burn_in and number % 1000 == 999:
            spread = np.cov(walked[number // 2 : number + 1].T) + 1e-12 * np.eye(len(here))
            root = 2.4 / np.sqrt(len(here)) * np.linalg.cholesky(spread)
    draws = walked[burn_in:]
    deviance = -2 * heights[burn_in:]
    return Posterior(family=family, draws=draws, dic=float(deviance.mean() + deviance.var() / 2))


def _checked(series: Array) -> Array:
    """A series that has a likelihood: two years at least, and none without any stock."""
    series = check_stocks(series, at_least=3)
    if (series == 0).any():
        where = int(np.argmax(series == 0))
        raise ValueError(f"stock {where} is 0, of which no model with lognormal noise has a likelihood")
    return series


def _family(name: str) -> tuple[list[str], Callable[..., Growth], list[tuple[float, float]]]:
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not one of {', '.join(FAMILIES)}")
    found = FAMILIES[name]
    return list(found.bounds), found.make, list(found.bounds.values())
