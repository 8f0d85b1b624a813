"""How many experts each layer keeps, when it is given or follows what layers suffer."""

import itertools
import math

import pytest
from moekit.compress import METHODS, CompressionPlan
from moekit.compress.allocation import losses_between
from moekit.compress.budget import sensitivity_counts, share_experts

from .plan_samples import layers_of, statistics


def shares(**options):
    return share_experts(layers_of("qwen3_moe"), statistics("qwen3_moe"), **options)


def test_given_numbers_are_kept():
    assert shares(layer_experts=(8, 3, 5)).num_kept == (8, 3, 5)
    assert shares(layer_experts=(8, 3, 5)).untouched == {0}
    plan = METHODS["reap"](layers_of("qwen3_moe"), statistics("qwen3_moe"), layer_experts=(8, 3, 5))
    assert [layer.num_kept for layer in plan.layers] == [8, 3, 5]
    assert plan.requested_experts == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_experts": (4, 4)}, "layer_experts has 2 numbers for 3 MoE layers"),
        ({"layer_experts": (4, 1, 4)}, "fewer than its router selects"),
        ({"layer_experts": (4, 9, 4)}, "experts=9 is not between 1 and 8"),
        ({"layer_experts": (4, 4, 4), "experts": 4}, "leave experts and ratio out"),
        ({"experts": 4, "grouping": "sensitivity"}, "needs the losses of each of 3 MoE layers, got 0"),
        (
            {"experts": 4, "grouping": "sensitivity", "sensitivities": [{2: 1.0}, {2: math.nan}, {2: 1.0}]},
            "sensitivities of layer 'model.layers.1.mlp': losses {2: nan} must be finite and not negative",
        ),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        shares(**options)


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [9.0, 1.0, 0.1], [0.0, 0.0, 5.0]])
def test_sensitive_layers_keep_more_and_the_total_is_met(scales):
    """Losses that double with each expert less, measured at the numbers that are asked for."""
    counts = sensitivity_counts(layers_of("qwen3_moe"), experts=4)
    assert counts == [(2, 3, 4, 6)] * 3
    curves = [{m: scale * 2.0**-m for m in numbers} for scale, numbers in zip(scales, counts, strict=True)]
    budget = shares(experts=4, grouping="sensitivity", sensitivities=curves)
    found = budget.num_kept
    assert sum(found) == budget.requested == 12
    assert all(2 <= number <= 8 for number in found)
    assert sorted(found) == [m for _, m in sorted(zip(scales, found, strict=True))]

    def loss(kept):
        losses = [losses_between(curve, range(2, 9), 8) for curve in curves]
        return sum(losses[i][m - 2] for i, m in enumerate(kept))

    possible = [kept for kept in itertools.product(range(2, 9), repeat=3) if sum(kept) == 12]
    assert loss(found) == pytest.approx(min(map(loss, possible)))


def test_layers_that_stay_need_no_losses():
    layers = layers_of("qwen3_moe")
    assert sensitivity_counts(layers, ratio=0.5, exclude_layers=[1]) == [(2, 3, 4, 6), (), (2, 3, 4, 6)]
    curve = {2: 9.0, 3: 4.0, 4: 1.0, 6: 0.5}
    options = {"grouping": "sensitivity", "sensitivities": [curve, {}, curve], "exclude_layers": [1]}
    budget = shares(ratio=0.5, **options)
    assert budget.num_kept == (4, 8, 4)
    plan = METHODS["reap"](layers, statistics("qwen3_moe"), ratio=0.5, **options)
    assert [layer.num_kept for layer in plan.layers] == [4, 8, 4]
    assert plan.settings["sensitivities"] == ["2: 9, 3: 4, 4: 1, 6: 0.5", "", "2: 9, 3: 4, 4: 1, 6: 0.5"]
    assert CompressionPlan.from_json(plan.to_json()).hash == plan.hash


def test_a_group_limited_router_is_given_what_divides_among_its_groups():
    layers = layers_of("deepseek_v3")
    asked = layers[0].num_experts // 2
    counts = sensitivity_counts(layers, experts=asked)
    curves = [{m: scale / m for m in numbers} for scale, numbers in zip((9.0, 0.1), counts, strict=False)]
    curves += [{m: 1 / m for m in numbers} for numbers in counts[2:]]
    options = {"experts": asked, "grouping": "sensitivity", "sensitivities": curves}
    plan = METHODS["reap"](layers, statistics("deepseek_v3"), **options)  # validated against the routers
    assert plan.actual_experts == asked * len(layers)
