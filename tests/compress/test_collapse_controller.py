"""The controller that stops before the tipping point, on curves that are known."""

import numpy as np
import pytest
from moekit.compress.gain_map import GainMap, GainStep, gain_figure
from moekit.compress.tipping_point import (
    GaussianProcess,
    LogPosterior,
    controller,
    sample_hyperparameters,
)
from moekit.compress.tipping_point.controller import Belief, believe, curve_of_runs, decide

WHOLE = 16
FLOOR = 0.85


def cliff(kept: float) -> float:
    """Hardly anything is lost until six experts are left, and then nearly all."""
    return 1 - 0.04 * (1 - kept) - 0.9 / (1 + np.exp((kept - 0.4) * 25))


def gentle(kept: float) -> float:
    return 1 - 0.1 * (1 - kept)


def descend(curve, risk: float, noise: float = 0.005) -> tuple[int, list[tuple[float, float]]]:
    """What is reached, and all cuts."""
    points: list[tuple[float, float]] = []
    here, failed = WHOLE, 0
    rng = np.random.default_rng(0)
    while True:
        sizes = list(range(here, 1, -1))
        belief = believe(points, np.array(sizes) / WHOLE, FLOOR)
        decision = decide(sizes, belief, risk=risk, whole=WHOLE, failed=failed)
        if decision.size is None:
            return here, points
        quality = min(1.0, curve(decision.size / WHOLE) + noise * rng.standard_normal())
        points.append((decision.size / WHOLE, float(quality)))
        if quality < FLOOR:
            failed = max(failed, decision.size)
        else:
            here = decision.size


def test_it_stops_before_the_cliff():
    reached, points = descend(cliff, 0.05)
    assert reached == 8  # 7 would have a quality of 0.73
    assert min(quality for _, quality in points) >= FLOOR


def test_it_goes_further_where_there_is_no_cliff_but_not_to_the_end():
    reached, points = descend(gentle, 0.05)
    assert reached < descend(cliff, 0.05)[0]
    assert reached > 2  # that nothing kept has no quality is known, and where it is lost is not
    assert min(quality for _, quality in points) >= FLOOR


def test_more_risk_goes_down_in_fewer_cuts():
    careful, bold = (descend(cliff, risk) for risk in (0.05, 0.3))
    assert len(bold[1]) < len(careful[1])
    assert bold[0] <= careful[0]


@pytest.mark.parametrize(("whole", "is_cut"), [(4, False), (8, True), (16, True), (64, True), (128, True)])
def test_the_first_cut_needs_no_luck(whole, is_cut):
    sizes = list(range(whole, 1, -1))
    decision = decide(sizes, believe([], np.array(sizes) / whole, 0.9), risk=0.05, whole=whole)
    assert (decision.size is not None) is is_cut  # one of four experts is much


def test_hyperparameters_are_averaged_as_by_a_walk():
    points = [(15 / 16, 0.99), (12 / 16, 0.97), (10 / 16, 0.90)]
    at, found = np.array(points).T
    kept = np.arange(3, 12) / 16
    expected = lambda share: 1 - (1 - share) ** 2  # noqa: E731
    target = LogPosterior(
        at,
        found - expected(at),
        controller.ENDS,
        length_prior=controller.LENGTH_PRIOR,
        noise_prior=controller.NOISE_PRIOR,
        amplitude=lambda share: controller.DEVIATION * (1 - share),
    )
    walk = sample_hyperparameters(target, np.random.default_rng(0), iterations=30_000, burn_in=3000, thin=20)
    means = [
        GaussianProcess(
            x=at,
            y=found - expected(at),
            length=length,
            noise=noise,
            amplitude=lambda share: controller.DEVIATION * (1 - share),
            pinned=controller.ENDS,
        ).posterior(kept)[0]
        for length, noise in walk
    ]
    assert np.allclose(believe(points, kept, FLOOR).mean, expected(kept) + np.mean(means, axis=0), atol=0.01)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_few_points_are_believed(number):
    points = [(15 / 16, 0.90), (14 / 16, 0.80)][:number]
    belief = believe(points, np.array([14 / 16, 12 / 16]), FLOOR)
    assert np.isfinite(belief.mean).all()
    assert (belief.mean[0] < believe([], np.array([14 / 16]), FLOOR).mean[0] - 0.01) is np.bool_(number > 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: believe([], np.array([1.5]), FLOOR), "must be a row of shares"),
        (lambda: believe([], np.array([0.5]), float("nan")), "floor=nan"),
        (lambda: decide([], believe([], np.array([0.5]), FLOOR), risk=0.1, whole=8), "must fall"),
        (lambda: decide([8, 4], believe([], np.array([1.0, 0.5]), FLOOR), risk=0.1, whole=0), "must fall"),
        (lambda: decide([8, 4], believe([], np.array([0.5]), FLOOR), risk=0.1, whole=8), "of 1 sizes"),
    ],
)
def test_what_is_no_question(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_risk_allows_no_cut():
    reached, points = descend(gentle, 0.0)
    assert (reached, points) == (WHOLE, [])


def test_the_same_points_give_the_same_belief():
    points = [(15 / 16, 0.99), (12 / 16, 0.97)]
    kept = np.arange(2, 17) / 16
    first, second = (believe(points, kept, FLOOR) for _ in range(2))
    assert np.array_equal(first.mean, second.mean)
    assert np.array_equal(first.crossing, second.crossing)
    part = believe(points, kept[4:7], FLOOR)  # whatever else is asked
    assert np.allclose(part.mean, first.mean[4:7])


def test_belief_is_sure_where_there_are_cuts_and_not_beyond():
    points = [(15 / 16, 0.99), (12 / 16, 0.98), (10 / 16, 0.97)]
    kept = np.array([10, 8, 6, 4]) / 16
    belief = believe(points, kept, FLOOR)
    assert belief.mean[0] == pytest.approx(0.97, abs=0.02)
    assert (np.diff(belief.deviation) > 0).all()
    assert (np.diff(belief.crossing) > 0).all()


def test_earlier_runs_are_what_is_expected_first():
    runs = [{0.5: 0.98, 0.25: 0.95}, {0.5: 0.96, 0.25: 0.93}]
    curve = curve_of_runs(runs)
    assert curve is not None
    assert curve(np.array([0.5, 0.25])) == pytest.approx([0.97, 0.94])
    kept = np.array([0.5])
    with_runs, without = believe([], kept, FLOOR, before=curve), believe([], kept, FLOOR)
    assert with_runs.mean[0] == pytest.approx(0.97, abs=0.03)
    assert with_runs.crossing[0] < without.crossing[0]
    assert curve_of_runs([]) is None


def test_the_plan_with_most_expected_savings_is_chosen():
    sizes = [8, 6, 4, 2]
    chances = np.array([0.0, 0.01, 0.04, 0.9])
    belief = Belief(kept=np.array(sizes) / 8, mean=np.ones(4), deviation=np.ones(4), crossing=chances)
    # To 4 at once: 0.96 * 0.5 - 0.01 = 0.47. By 6: 0.99 * (0.25 + 0.96 * 0.25 - 0.01) - 0.01 = 0.465.
    assert decide(sizes, belief, risk=0.05, whole=8).size == 4
    assert decide(sizes, belief, risk=0.02, whole=8).size == 6
    assert decide(sizes, belief, risk=0.05, whole=8, failed=4).size == 6
    stopped = decide(sizes, belief, risk=0.005, whole=8)
    assert stopped.size is None
    assert "6 experts: below the floor with 1.0%, more than 0.5%" in stopped.reason
    last = believe([], np.array([0.25]), FLOOR)
    assert decide([2], last, risk=0.5, whole=8).reason == "nothing smaller is possible"


@pytest.mark.parametrize("risk", [-0.1, 1.1])
def test_a_risk_that_is_no_probability(risk):
    belief = believe([], np.array([1.0, 0.5]), FLOOR)
    with pytest.raises(ValueError, match="is not a probability"):
        decide([16, 8], belief, risk=risk, whole=16)


@pytest.mark.parametrize("point", [(0.0, 0.5), (1.2, 0.5), (0.5, 1.5), (0.5, float("nan"))])
def test_points_that_are_none(point):
    with pytest.raises(ValueError, match="must be shares kept"):
        believe([point], np.array([0.5]), FLOOR)


def test_the_gain_map_shows_where_it_tips():
    steps = [
        GainStep(size="6 experts", num_bytes=600, risk=0.01, expected=0.97, quality=0.98, is_kept=True),
        GainStep(size="4 experts", num_bytes=400, risk=0.04, expected=0.93, quality=0.60, is_kept=False),
    ]
    gains = GainMap(
        floor=0.9,
        risk=0.05,
        sizes=[8, 6, 4, 2],
        labels=[f"{size} experts" for size in (8, 6, 4, 2)],
        unit="experts of each layer",
        num_bytes=[800, 600, 400, 200],
        mean=[1.0, 0.97, 0.6, 0.2],
        deviation=[0.01] * 4,
        crossing=[0.0, 0.01, 0.99, 1.0],
        steps=steps,
        stop="4 experts: tried, and below the floor",
    )
    assert gains.tipping_point == 2
    axes = gain_figure(gains).axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words == ["1", "2", "tipping point\nprobably at\n4 experts"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"kept", "taken back"}
