"""Numbers of experts by measured losses."""

import itertools
import math

import numpy as np
import pytest
from moekit.compress.allocation import counts_to_measure, least_loss, losses_between, possible_counts

from .plan_samples import layers_of


def test_losses_between_measured_ones():
    """The square root is linear: 4, 1 and 0 at 2, 4 and 8 experts have the roots 2, 1 and 0."""
    found = losses_between({2: 4.0, 4: 1.0}, range(2, 9), 8)
    roots = [2, 1.5, 1, 0.75, 0.5, 0.25, 0]
    assert found.tolist() == [root**2 for root in roots]


def test_fewer_experts_never_cost_less():
    assert losses_between({2: 1.0, 4: 9.0}, range(2, 6), 5).tolist() == [9, 9, 9, 0]


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({4: 1.0}, "no loss was measured at 2 experts"),
        ({2: math.nan}, "finite and not negative"),
        ({2: -1.0}, "finite and not negative"),
        ({2: math.inf}, "finite and not negative"),
    ],
)
def test_losses_that_cannot_be(measured, message):
    with pytest.raises(ValueError, match=message):
        losses_between(measured, range(2, 9), 8)


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_of_losses_is_the_least_there_is(seed):
    """Against trying all, for losses of no particular shape."""
    generator = np.random.default_rng(seed)
    possible = [range(2, 9), range(2, 9, 2), range(3, 7)]
    losses = [generator.random(len(counts)) for counts in possible]
    found = least_loss(losses, possible, 13)
    tried = {
        kept: sum(losses[i][possible[i].index(count)] for i, count in enumerate(kept))
        for kept in itertools.product(*possible)
        if sum(kept) == 13
    }
    assert found == min(tried, key=tried.__getitem__)


def test_a_total_that_cannot_be():
    with pytest.raises(ValueError, match="which may keep 2 to 4, 2 to 4 experts, cannot add up to 9"):
        least_loss([np.zeros(3), np.zeros(3)], [range(2, 5), range(2, 5)], 9)


def test_layers_of_equal_losses_keep_equal_numbers():
    losses = [np.array([(8 - m) ** 2.0 for m in range(2, 9)])] * 3
    assert least_loss(losses, [range(2, 9)] * 3, 12) == (4, 4, 4)


def test_counts_of_a_plain_router():
    layer = layers_of("qwen3_moe")[0]
    assert (layer.num_experts, layer.top_k) == (8, 2)
    assert possible_counts(layer, 4) == range(2, 9)
    assert counts_to_measure(layer, 4) == (2, 3, 4, 6)
    assert counts_to_measure(layer, 2) == (2, 5)
    assert counts_to_measure(layer, 8) == (2, 5)


def test_counts_of_a_group_limited_router_divide_among_its_groups():
    layer = layers_of("deepseek_v3")[0]
    groups = layer.router_constraints.num_groups
    asked = layer.num_experts // groups // 2 * groups
    possible = possible_counts(layer, asked)
    assert groups > 1
    assert all(count % groups == 0 for count in possible)
    assert asked in possible
    assert possible[-1] == layer.num_experts
    size = layer.num_experts // groups
    each = possible[0] // groups
    layer.check_removal([group * size + i for group in range(groups) for i in range(each)])
