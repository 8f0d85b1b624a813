"""Probabilities of the next stock, for every stock and harvest on a grid."""

# H harvests, X stocks; both on the same grid

from collections.abc import Sequence

import numpy as np
from scipy.stats import lognorm, norm

from .gaussian_process import GaussianProcess
from .population import Array, Growth, check_noise


def check_grid(grid: Array) -> Array:
    """Refuse a grid that does not begin at zero and rise evenly.

    Raises:
        ValueError: Says how it should be.
    """
    grid = np.asarray(grid, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not np.isfinite(grid).all() or grid[0] != 0:
        raise ValueError("a grid of stocks is a row of at least 2 finite numbers that begins with 0")
    spacing = np.diff(grid)
    if spacing[0] <= 0 or not np.allclose(spacing, spacing[0]):
        raise ValueError("a grid of stocks must rise in even steps")
    return grid


def by_harvest(rows_SX: Array) -> Array:
    """From rows by escapement to rows by harvest and stock, of which only the difference counts."""
    indices = np.arange(len(rows_SX))
    return rows_SX[np.maximum(indices[None, :] - indices[:, None], 0)]


def normalised(density_SX: Array, means_S: Array, grid: Array) -> Array:
    """Rows of probabilities; all of it at zero where the mean is nearest to that.

    Where no point of the grid has any density (a mean far beyond it, hardly any noise) the nearest has all.
    """
    total = density_SX.sum(1)
    snaps = (means_S <= grid[1] / 2) | ~(total > 0)
    rows = np.where(snaps[:, None], 0.0, density_SX / np.where(snaps, 1.0, total)[:, None])
    nearest = np.rint(np.clip(means_S / grid[1], 0, len(grid) - 1)).astype(int)
    rows[snaps, np.where(means_S <= grid[1] / 2, 0, nearest)[snaps]] = 1.0
    return rows


def gp_transitions(processes: Sequence[GaussianProcess], grid: Array) -> Array:
    """Transitions averaged over draws of the hyper-parameters.

    The next stock is normal with the posterior's mean and variance at the escapement and the noise of the
    process. Zero is absorbing.

    Args:
        processes: One for each draw.
        grid: Stocks and harvests.

    Returns:
        ``H X X`` probabilities; rows sum to 1.

    Raises:
        ValueError: No processes, or a grid that is none.
    """
    grid = check_grid(grid)
    _check_any(processes)
    rows = np.zeros((len(grid), len(grid)))
    for process in processes:
        mean, variance = process.posterior(grid)
        deviation = np.sqrt(variance + process.noise**2)
        rows += normalised(norm.pdf(grid, mean[:, None], deviation[:, None]), mean, grid)
    rows[0] = np.eye(len(grid))[0]
    return by_harvest(rows / rows.sum(1, keepdims=True))


def model_transitions(models: Sequence[tuple[Growth, float]], grid: Array) -> Array:
    """Transitions of models with lognormal noise, averaged over them.

    Args:
        models: Growth and deviation of the logarithm; one, or draws from a posterior.
        grid: Stocks and harvests.

    Returns:
        ``H X X`` probabilities; rows sum to 1.

    Raises:
        ValueError: No models, a noise that is not above 0, or a grid that is none.
    """
    grid = check_grid(grid)
    _check_any(models)
    for _, noise in models:
        check_noise(noise, is_needed=True)
    rows = np.zeros((len(grid), len(grid)))
    for growth, noise in models:
        mean = growth(grid)
        scale = np.where(mean > 0, mean, 1.0)
        rows += normalised(lognorm.pdf(grid, noise, scale=scale[:, None]), mean, grid)
    rows[0] = np.eye(len(grid))[0]
    return by_harvest(rows / rows.sum(1, keepdims=True))


def _check_any(models: Sequence[object]) -> None:
    if not len(models):
        raise ValueError("transitions cannot be averaged over no models; give at least one")
