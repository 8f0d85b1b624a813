"""How many experts each layer keeps, when it is given or follows what layers suffer."""

import itertools

import pytest
from moekit.compress import METHODS
from moekit.compress.budget import share_experts

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
        ({"experts": 4, "grouping": "sensitivity"}, "needs a loss for each of 3 MoE layers, got 0"),
        (
            {"experts": 4, "grouping": "sensitivity", "sensitivities": [1.0, float("nan"), 1.0]},
            "must be finite and not negative",
        ),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        shares(**options)


@pytest.mark.parametrize("sensitivities", [[1.0, 1.0, 1.0], [9.0, 1.0, 0.1], [0.0, 0.0, 5.0]])
def test_sensitive_layers_keep_more_and_the_total_is_met(sensitivities):
    found = shares(experts=4, grouping="sensitivity", sensitivities=sensitivities).num_kept
    assert sum(found) == 12
    assert all(2 <= number <= 8 for number in found)

    def loss(kept):
        return sum(s * ((8 - m) / 4) ** 2 for s, m in zip(sensitivities, kept, strict=True))

    possible = [kept for kept in itertools.product(range(2, 9), repeat=3) if sum(kept) == 12]
    assert loss(found) == pytest.approx(min(map(loss, possible)))
