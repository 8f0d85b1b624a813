"""How many fish there will be, of those that are left: the models of the paper."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Growth = Callable[[Array], Array]
"""From escapements (what harvest has left) to the expected next stocks."""


LARGEST_EXPONENT = 50.0


class _Model:
    """Of positive parameters."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < np.inf:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be a positive number")


def _exp(exponent: Array) -> Array:
    """Finite for any parameters that a search may try."""
    return np.exp(np.minimum(exponent, LARGEST_EXPONENT))


@dataclass(frozen=True, kw_only=True)
class Allen(_Model):
    """Allen's model, with a tipping point C: ``s exp(r (1 - s/K) (s - C)/K)``.

    Below C a stock shrinks year by year, to nothing.

    *Departs from the paper*, whose equation leaves out the division by K that its code has.
    """

    r: float = 2.0
    K: float = 8.0
    C: float = 5.0

    def __call__(self, escapement: Array) -> Array:
        """Expected next stocks."""
        s = np.asarray(escapement, dtype=np.float64)
        return s * _exp(self.r * (1 - s / self.K) * (s - self.C) / self.K)


@dataclass(frozen=True, kw_only=True)
class Ricker(_Model):
    """Ricker's model, which always recovers: ``s exp(r (1 - s/K))``."""

    r: float
    K: float

    def __call__(self, escapement: Array) -> Array:
        """Expected next stocks."""
        s = np.asarray(escapement, dtype=np.float64)
        return s * _exp(self.r * (1 - s / self.K))


@dataclass(frozen=True, kw_only=True)
class Myers(_Model):
    """Myers' model, ``r s^theta / (1 + s^theta / K)``; theta = 1 is Beverton and Holt's.

    It has a tipping point where theta is above 1.
    """

    r: float
    theta: float
    K: float

    def __call__(self, escapement: Array) -> Array:
        """Expected next stocks."""
        s = np.asarray(escapement, dtype=np.float64) ** self.theta
        return self.r * s / (1 + s / self.K)


def check_stocks(stocks: Array, at_least: int = 2) -> Array:
    """Refuse what are no stocks.

    Args:
        stocks: A series.
        at_least: Fewest points.

    Returns:
        The series as floats.

    Raises:
        ValueError: Too few, negative, NaN or infinite; says which.
    """
    series = np.asarray(stocks, dtype=np.float64)
    if series.ndim != 1 or len(series) < at_least:
        raise ValueError(f"a series of at least {at_least} stocks is needed, got shape {series.shape}")
    if not np.isfinite(series).all():
        where = int(np.argmin(np.isfinite(series)))
        raise ValueError(f"stock {where} is {series[where]}; every stock must be a finite number")
    if (series < 0).any():
        where = int(np.argmax(series < 0))
        raise ValueError(f"stock {where} is {series[where]}, but no stock is below 0")
    return series


def check_noise(noise: float, *, is_needed: bool = False) -> None:
    """Refuse what is no deviation.

    Args:
        noise: To check.
        is_needed: Without noise there would be no density.

    Raises:
        ValueError: Negative, NaN or infinite, or zero where it is needed.
    """
    if not np.isfinite(noise) or noise < 0 or (is_needed and noise == 0):
        lowest = "above 0" if is_needed else "of at least 0"
        raise ValueError(f"noise={noise} is no deviation: it must be a finite number {lowest}")


def simulate_unharvested(
    growth: Growth, *, start: float, years: int, noise: float, rng: np.random.Generator
) -> Array:
    """A series of stocks that nobody harvests.

    Args:
        growth: Of the population.
        start: First stock.
        years: Length of the series.
        noise: Deviation of the logarithm of the yearly factor.
        rng: Source of that.

    Raises:
        ValueError: A start or a noise below zero or not finite, or no year at all.
    """
    check_stocks(np.array([start]), at_least=1)
    check_noise(noise)
    if years < 1:
        raise ValueError(f"years={years} must be at least 1")
    stocks = [start]
    for factor in np.exp(noise * rng.standard_normal(years - 1)):
        stocks.append(float(factor * growth(np.array([stocks[-1]]))[0]))
    return np.array(stocks)
