"""Comparison within groups."""

import pytest
import torch
from moekit.rl.group_statistics import centred, group_mean, group_total, leave_one_out, z_scores

GROUPS = torch.tensor([7, 2, 7, 2, 7, 5])
VALUES = torch.tensor([1.0, 4.0, 2.0, 8.0, 6.0, 3.0], dtype=torch.float64)
ALL = torch.ones(6, dtype=torch.bool)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))


def test_totals_and_means():
    close(group_total(VALUES, GROUPS), [9.0, 12.0, 9.0, 12.0, 9.0, 3.0])
    close(group_mean(VALUES, GROUPS, ALL), [3.0, 6.0, 3.0, 6.0, 3.0, 3.0])


def test_differences():
    close(centred(VALUES, GROUPS, ALL), [-2.0, -2.0, -1.0, 2.0, 3.0, 0.0])
    close(leave_one_out(VALUES, GROUPS, ALL), [-3.0, -4.0, -1.5, 4.0, 4.5, 0.0])
    close(z_scores(VALUES, GROUPS, ALL, epsilon=0.0)[:4], [-2 / 7**0.5, -1 / 2**0.5, -1 / 7**0.5, 1 / 2**0.5])
    assert z_scores(VALUES, GROUPS, ALL)[5] == 0


@pytest.mark.parametrize("function", [centred, leave_one_out, z_scores])
def test_what_does_not_count_is_0_and_changes_nothing(function):
    counts = torch.tensor([True, True, True, True, False, False])
    holes = torch.where(counts, VALUES, torch.nan)
    found = function(holes, GROUPS, counts)
    assert (found[4:] == 0).all()
    torch.testing.assert_close(found[:4], function(VALUES[:4], GROUPS[:4], ALL[:4]))
    assert found.isfinite().all()


@pytest.mark.parametrize("function", [centred, leave_one_out, z_scores])
def test_order_changes_nothing(function):
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    torch.testing.assert_close(
        function(VALUES[order], GROUPS[order], ALL), function(VALUES, GROUPS, ALL)[order]
    )


@pytest.mark.parametrize("function", [centred, leave_one_out, z_scores])
def test_equal_rewards_have_no_sign(function):
    for size in (3, 7, 64):
        for value in (0.1, 0.7, 1e6 + 0.3, -1 / 3):
            rewards = torch.full((size,), value)
            found = function(rewards, torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool))
            assert (found == 0).all()


def test_the_middle_of_a_group_has_no_sign():
    rewards = torch.tensor([0.1, 0.2, 0.3])
    assert centred(rewards, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool))[1] == 0


def test_small_differences_are_not_lost():
    rewards = torch.tensor([1.0, 1.0 + 1e-5])
    found = centred(rewards, torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    assert found[0] < 0 < found[1]
