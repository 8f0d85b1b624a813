"""Replicates of a harvested population, and what a policy earned."""

# R replicates, T years

from dataclasses import dataclass

import numpy as np

from .decision import Policy
from .population import Array, Growth, check_noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Replicates:
    """What happened under a policy."""

    stocks: Array
    """R T, before the harvest of the year."""
    harvests: Array
    """R T."""

    @property
    def total_harvest(self) -> Array:
        """Of each replicate, without discount, as the paper adds them; the last year has none."""
        return self.harvests[:, :-1].sum(1)

    def crash_share(self, extinct_below: float) -> float:
        """Share of the replicates whose last stock is below a number."""
        return float((self.stocks[:, -1] < extinct_below).mean())


def simulate(
    growth: Growth,
    policy: Policy,
    *,
    noise: float = 0.05,
    start: float = 10.0,
    years: int = 50,
    replicates: int = 100,
    seed: int = 0,
) -> Replicates:
    """Let a population live under a policy.

    Args:
        growth: The truth.
        policy: What is harvested.
        noise: Deviation of the logarithm of the yearly factor.
        start: First stock.
        years: T.
        replicates: R.
        seed: Of the noise; the same for all policies that are compared.

    Raises:
        ValueError: A start or a noise below zero or not finite, or numbers of years or replicates that are
            not positive.
    """
    check_noise(noise)
    if not (np.isfinite(start) and start >= 0):
        raise ValueError(f"start={start} is no stock: it must be a finite number from 0 up")
    if years < 2 or replicates < 1:
        raise ValueError(f"years={years} and replicates={replicates} must be at least 2 and 1")
    factors_RT = np.exp(noise * np.random.default_rng(seed).standard_normal((replicates, years)))
    stocks, harvests = np.empty((2, replicates, years))
    now_R = np.full(replicates, start)
    for year in range(years):
        stocks[:, year], harvests[:, year] = now_R, policy.at(now_R)
        now_R = factors_RT[:, year] * growth(now_R - harvests[:, year])
    return Replicates(stocks=stocks, harvests=harvests)
