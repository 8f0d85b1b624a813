"""From a series of stocks to a policy, in one call."""

import numpy as np

from .decision import Policy, solve
from .gaussian_process import GaussianProcess, LogPosterior, sample_hyperparameters
from .population import Array, check_stocks
from .published import published_processes, published_solution, published_transitions
from .transitions import check_grid, gp_transitions


def gp_policy(
    series: Array,
    grid: Array,
    *,
    seed: int = 0,
    iterations: int = 100_000,
    published_code: bool = False,
) -> Policy:
    """What to harvest of a population that was only watched: Gaussian process dynamic programming.

    Args:
        series: Stocks year by year, nobody harvesting.
        grid: Stocks and harvests, evenly from 0.
        seed: Of the walk over hyper-parameters.
        iterations: Steps of it; a tenth is forgotten, and 300 of the others are kept.
        published_code: Compute what the authors' released code does instead, fault by fault (published.py);
            it has its own numbers of steps.

    Raises:
        ValueError: A series or a grid that is none, or a grid that ends below the largest stock.

    Reference: Boettiger, Mangel and Munch, "Avoiding tipping points in fisheries management through Gaussian
    process dynamic programming" (2015), arXiv:1412.8081.
    """
    series, rng = check_stocks(series, at_least=3), np.random.default_rng(seed)
    grid = check_grid(grid)
    if grid[-1] < series.max():
        raise ValueError(
            f"the grid ends at {grid[-1]:g}, below the largest stock, {series.max():g}; it must "
            "cover all of them"
        )
    x, y = series[:-1], series[1:]
    if published_code:
        return published_solution(published_transitions(published_processes(x, y, rng), grid), grid)
    burn_in = iterations // 10
    thin = max(1, (iterations - burn_in) // 300)
    target = LogPosterior(x, y)
    drawn = sample_hyperparameters(target, rng, iterations=iterations, burn_in=burn_in, thin=thin)
    processes = [GaussianProcess(x=x, y=y, length=length, noise=noise) for length, noise in drawn]
    return solve(gp_transitions(processes, grid), grid)
