"""The entropy law on data that follow it, and on data that cannot."""

import math

import pytest
from moekit.rl.entropy_law import EntropyLaw, fit_entropy_law

ENTROPIES = [1.2, 0.9, 0.6, 0.3, 0.1]


def test_exact_data_give_the_law_back():
    truth = EntropyLaw(a=0.15, b=0.8, r_squared=1.0, num_points=5)
    law = fit_entropy_law(ENTROPIES, [truth.predict(h) for h in ENTROPIES])
    assert (law.a, law.b, law.r_squared) == pytest.approx((0.15, 0.8, 1.0))
    assert law.ceiling == pytest.approx(0.65)
    assert law.predict(0.0) == pytest.approx(law.ceiling)


def test_noise_lowers_r_squared_as_defined():
    scores = [0.2, 0.5, 0.4, 0.6, 0.62]
    law = fit_entropy_law(ENTROPIES, scores)
    mean = sum(scores) / 5
    residual = sum((y - law.predict(h)) ** 2 for h, y in zip(ENTROPIES, scores, strict=True))
    assert law.r_squared == pytest.approx(1 - residual / sum((y - mean) ** 2 for y in scores))
    for da, db in ((1e-3, 0), (0, 1e-3)):
        other = EntropyLaw(a=law.a + da, b=law.b + db, r_squared=0.0, num_points=5)
        assert sum((y - other.predict(h)) ** 2 for h, y in zip(ENTROPIES, scores, strict=True)) > residual


def test_pairs_with_nan_are_left_out():
    law = fit_entropy_law([*ENTROPIES, math.nan, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.nan])
    assert law == fit_entropy_law(ENTROPIES, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert law.num_points == 5


def test_scores_that_do_not_vary_have_no_r_squared():
    law = fit_entropy_law(ENTROPIES, [0.5] * 5)
    assert math.isnan(law.r_squared)
    assert (law.a, law.ceiling) == pytest.approx((0.0, 0.5))


@pytest.mark.parametrize(
    ("entropies", "scores", "message"),
    [
        ([1.0, 0.5], [0.1, 0.2], "needs 3 pairs of entropy and score; there are 2"),
        ([1.0, 0.5, math.nan], [0.1, 0.2, 0.3], "there are 2"),
        ([1.0, 0.5], [0.1], "2 entropies do not belong to 1 scores"),
        ([1.0, 1.0, 1.0], [0.1, 0.2, 0.3], "do not vary"),
        ([1e4, 2e4, 3e4], [0.1, 0.2, 0.3], "absurd"),
    ],
)
def test_data_without_a_law_are_refused(entropies, scores, message):
    with pytest.raises(ValueError, match=message):
        fit_entropy_law(entropies, scores)
