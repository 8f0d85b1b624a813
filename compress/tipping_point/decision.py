"""What to harvest: stochastic dynamic programming over stocks."""

# H harvests, X stocks; both on the same grid

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .population import Array, check_stocks
from .transitions import check_grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A harvest for every stock of a grid."""

    grid: Array
    harvest_index: NDArray[np.int64]
    """Into the grid."""
    value: Array
    """Discounted harvests to come."""

    @property
    def harvest(self) -> Array:
        """By stock."""
        return np.minimum(self.grid[self.harvest_index], self.grid)

    @property
    def escapement(self) -> Array:
        """What is left, by stock."""
        return self.grid - self.harvest

    def at(self, stocks: Array) -> Array:
        """Harvests of stocks off the grid: that of the nearest point, and never more than there is.

        Raises:
            ValueError: Negative stocks, NaN or infinity.
        """
        stocks = check_stocks(np.atleast_1d(stocks), at_least=1)
        spacing = self.grid[1]
        nearest = np.clip(np.rint(stocks / spacing).astype(int), 0, len(self.grid) - 1)
        return np.minimum(self.grid[self.harvest_index][nearest], stocks)


def solve(
    transitions_HXX: Array,
    grid: Array,
    *,
    discount: float = 0.99,
    iterations: int = 10_000,
    tolerance: float | None = None,
) -> Policy:
    """Value iteration: the harvest today that is worth most with all that follows.

    Args:
        transitions_HXX: Probabilities of the next stock by harvest and stock.
        grid: Stocks and harvests; the reward is the harvest, at most the stock.
        discount: Worth of a harvest next year, in (0, 1).
        iterations: At most so many.
        tolerance: Change of values at which to stop; ``(1 - d) 1e-4 / (2 d)`` unless said otherwise.

    Raises:
        ValueError: Rows do not sum to 1, shapes differ, a grid that is none, or the discount is out of range.
        RuntimeError: The values still change after all iterations.

    Reference: Boettiger et al. (2015), equation 7. The released code adds the undiscounted value instead.
    """
    if not 0 < discount < 1:
        raise ValueError(f"discount={discount} must lie between 0 and 1")
    grid = check_grid(grid)
    size = len(grid)
    if transitions_HXX.shape != (size, size, size):
        raise ValueError(f"transitions have shape {transitions_HXX.shape}, not {(size, size, size)}")
    if not np.allclose(transitions_HXX.sum(-1), 1) or (transitions_HXX < 0).any():
        raise ValueError("rows of transitions must be probabilities that sum to 1")
    reward_HX = np.minimum(grid[:, None], grid[None, :])
    limit = (1 - discount) * 1e-4 / (2 * discount) if tolerance is None else tolerance
    value_X, worth_HX = np.zeros(size), reward_HX
    for _ in range(iterations):
        worth_HX = reward_HX + discount * transitions_HXX @ value_X
        before, value_X = value_X, worth_HX.max(0)
        if np.abs(value_X - before).max() < limit:
            break
    else:
        raise RuntimeError(
            f"values still change by more than {limit:.3g} after {iterations} iterations; give more of them, "
            "or a larger tolerance"
        )
    return Policy(grid=grid, harvest_index=worth_HX.argmax(0), value=value_X)
