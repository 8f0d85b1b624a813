"""pass@k against all subsets, and its interval."""

from itertools import combinations

import numpy as np
import pytest
from moekit.rl.pass_at_k import bootstrap_interval, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        expected = [sum(min(chosen) < c for chosen in subsets) / len(subsets) for c in range(n + 1)]
        np.testing.assert_allclose(pass_at_k(n, np.arange(n + 1), k), expected, atol=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels():
    found = pass_at_k(100_000, np.array([0, 1, 99_999]), 1000)
    np.testing.assert_allclose(found, [0.0, 0.01, 1.0], rtol=1e-9)


def test_problems_may_have_different_numbers_of_samples():
    np.testing.assert_allclose(pass_at_k(np.array([2, 4]), np.array([1, 1]), 2), [1.0, 0.5])


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=r"must be"):
        pass_at_k(n, np.array([c]), k)


def test_interval_covers_the_mean_and_shrinks_with_problems():
    few, many = (np.tile([0.0, 1.0, 0.5, 0.25], times) for times in (5, 100))
    intervals = [bootstrap_interval(values) for values in (few, many)]
    for low, high in intervals:
        assert low < few.mean() < high
    widths = [high - low for low, high in intervals]
    assert widths[1] < 0.4 * widths[0]
    # The normal approximation, 2 * 1.96 * std / sqrt(n).
    assert widths[1] == pytest.approx(3.92 * many.std() / np.sqrt(400), rel=0.1)
    assert bootstrap_interval(np.full(3, 0.5)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(np.array([0.5, np.nan]))
