"""What the released code computes, which is not what the paper says; to show the difference that makes.

cboettig/nonparametric-bayes and pdg_control:

1. value iteration adds the undiscounted value of what follows to (1 - d) times the reward: no convergence;
2. the mean of the next stock is that of one grid cell below the escapement, its variance that of the stock
   before the harvest, without the noise of the process;
3. the priors are gamma, on the logarithms without a Jacobian;
4. the log-likelihood subtracts all of the log-determinant, not half;
5. the point (0, 0) has the noise of the others.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import solve_triangular
from scipy.stats import norm

from .decision import Policy
from .gaussian_process import JITTER, GaussianProcess, check_points, sample_hyperparameters
from .population import Array
from .transitions import check_grid, normalised

LENGTH_PRIOR = (10.0, 10.0)
"""Shape and scale of a gamma prior."""
NOISE_PRIOR = (5.0, 5.0)
"""Shape and rate."""
ITERATIONS = 1000


class PublishedLogPosterior:
    """Faults 3 to 5; as `LogPosterior` otherwise."""

    def __init__(self, x: Array, y: Array) -> None:
        check_points(x, y)
        self.at, self.targets = np.append(0.0, x), np.append(0.0, y)
        self.squares = (self.at[:, None] - self.at) ** 2

    def __call__(self, logs: Array) -> float:
        """At (log length, log noise)."""
        length, noise = np.exp(logs)
        covariance = np.exp(-0.5 * self.squares / length**2)
        covariance.flat[:: len(self.at) + 1] += noise**2 + JITTER
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            return -np.inf
        half = solve_triangular(factor, self.targets, lower=True, check_finite=False)
        likelihood = -0.5 * half @ half - 2 * np.log(factor.diagonal()).sum()
        shape, scale = LENGTH_PRIOR
        by_length = (shape - 1) * np.log(length) - length / scale
        shape, rate = NOISE_PRIOR
        by_noise = (shape - 1) * np.log(noise) - rate * noise
        return float(likelihood + by_length + by_noise)


def published_processes(x: Array, y: Array, rng: np.random.Generator) -> list[GaussianProcess]:
    """Processes of the released code's posterior."""
    x, y = np.append(0.0, x), np.append(0.0, y)
    drawn = sample_hyperparameters(PublishedLogPosterior(x[1:], y[1:]), rng)
    return [GaussianProcess(x=x, y=y, length=a, noise=b, pinned=()) for a, b in drawn]


def published_transitions(processes: Sequence[GaussianProcess], grid: Array) -> Array:
    """Fault 2, averaged over the processes; ``H X X``."""
    grid = check_grid(grid)
    size = len(grid)
    shifted = np.arange(size)[None, :] - np.arange(size)[:, None] - 1  # one cell too far down
    result = np.zeros((size, size, size))
    for process in processes:
        mean, variance = process.posterior(grid)
        mean_HX = np.where(shifted >= 0, mean[np.maximum(shifted, 0)], 0.0)
        deviation_HX = np.broadcast_to(np.sqrt(variance), mean_HX.shape)
        density = norm.pdf(grid, mean_HX[..., None], deviation_HX[..., None])
        result += normalised(density.reshape(-1, size), mean_HX.ravel(), grid).reshape(result.shape)
    return result / result.sum(-1, keepdims=True)


def published_solution(transitions_HXX: Array, grid: Array, *, discount: float = 0.99) -> Policy:
    """Fault 1: a thousand undiscounted steps."""
    reward_HX = (1 - discount) * np.minimum(grid[:, None], grid[None, :])
    value_X, worth_HX = np.zeros(len(grid)), reward_HX
    for _ in range(ITERATIONS):
        worth_HX = transitions_HXX @ value_X + reward_HX
        value_X = worth_HX.max(0)
    return Policy(grid=grid, harvest_index=worth_HX.argmax(0), value=value_X)


def released_escapement(grid: Array) -> Array:
    """The escapements that the authors archived: none below 6.1, 6.43 up to about 8.9 and 6.73 above."""
    index = np.arange(len(grid))
    kept = np.where(index < 21, index, np.where(grid < 8.9, 21, 22))
    return grid[np.where(grid < 6.1, 0, kept)]
