"""Gaussian-process dynamic programming on the fishery of its paper."""

import itertools

import numpy as np
import pytest
from moekit.compress.tipping_point import (
    Allen,
    GaussianProcess,
    LogPosterior,
    Myers,
    Ricker,
    fit,
    gp_policy,
    gp_transitions,
    model_transitions,
    most_likely,
    sample_hyperparameters,
    simulate,
    simulate_unharvested,
    solve,
)
from moekit.compress.tipping_point.fishery_data import SERIES
from moekit.compress.tipping_point.parametric import log_likelihood
from moekit.compress.tipping_point.published import published_transitions, released_escapement
from scipy.integrate import quad
from scipy.stats import invgamma, multivariate_normal

GRID = np.linspace(0, 15, 50)
DATA = np.array(SERIES)
X, Y = DATA[:-1], DATA[1:]
TRUTH = Allen()
RNG = np.random.default_rng(0)


def optimum():
    return solve(model_transitions([(TRUTH, 0.05)], GRID), GRID)


@pytest.fixture(scope="module")
def processes():
    drawn = sample_hyperparameters(
        LogPosterior(X, Y), np.random.default_rng(0), iterations=6000, burn_in=1000, thin=50
    )
    return [GaussianProcess(x=X, y=Y, length=length, noise=noise) for length, noise in drawn]


def test_the_truth_leaves_6_73_and_nobody_crashes():
    policy = optimum()
    assert np.allclose(policy.escapement[22:], 6.7347, atol=1e-4)
    found = simulate(TRUTH, policy)
    assert found.crash_share(1.0) == 0
    assert found.stocks.shape == (100, 50)


def test_the_process_keeps_the_stock_and_earns_what_the_truth_earns(processes):
    policy = solve(gp_transitions(processes, GRID), GRID)
    best, found = (simulate(TRUTH, p) for p in (optimum(), policy))
    assert found.crash_share(1.0) <= 0.05
    assert (found.total_harvest / best.total_harvest).mean() >= 0.9


def test_the_policy_of_a_series_in_one_call():
    policy = gp_policy(DATA, GRID, iterations=3000)
    assert simulate(TRUTH, policy).crash_share(1.0) <= 0.05
    with pytest.raises(ValueError, match="at least 3 stocks"):
        gp_policy(DATA[:2], GRID)


def test_ricker_crashes_in_every_replicate():
    fitted = fit("Ricker", DATA)
    policy = solve(model_transitions([(fitted.growth, fitted.noise)], GRID), GRID)
    assert simulate(TRUTH, policy).crash_share(1.0) == 1


def test_most_likely_parameters_are_the_known_ones():
    fitted = fit("Allen", DATA)
    assert fitted.parameters == pytest.approx({"r": 1.30, "K": 7.73, "C": 4.76}, abs=0.01)
    assert fitted.noise == pytest.approx(0.045, abs=0.001)
    assert fitted.log_likelihood >= log_likelihood(TRUTH, 0.05, DATA)
    assert fitted.aic == pytest.approx(8 - 2 * fitted.log_likelihood)
    assert fitted.bic == pytest.approx(4 * np.log(39) - 2 * fitted.log_likelihood)


@pytest.mark.slow
def test_the_released_code_leaves_what_its_authors_archived():
    policy = gp_policy(DATA, GRID, published_code=True)
    same = np.isclose(policy.escapement, released_escapement(GRID))
    # From 6.43 to 6.73 it goes at stocks of about 8.6 to 8.9; the draws of the walk decide where.
    assert same[:28].all()
    assert same[30:].all()
    assert 0.05 < simulate(TRUTH, policy).crash_share(1.0) < 0.3


@pytest.mark.parametrize("name", ["gp", "model", "published"])
def test_transitions_are_probabilities_and_zero_stays(processes, name):
    made = {
        "gp": lambda: gp_transitions(processes[:5], GRID),
        "model": lambda: model_transitions([(TRUTH, 0.05), (Ricker(r=0.7, K=8.0), 0.1)], GRID),
        "published": lambda: published_transitions(processes[:2], GRID),
    }[name]()
    assert np.allclose(made.sum(-1), 1)
    assert (made >= 0).all()
    assert (made[:, 0, 0] == 1).all()
    harvested = np.arange(50)[:, None] >= np.arange(50)  # all of the stock is taken
    assert (made[harvested, 0] == 1).all()


def test_parametric_transitions_without_noise_go_to_the_nearest_point():
    made = model_transitions([(TRUTH, 1e-9)], GRID)
    assert made[0].argmax(-1)[10:30].tolist() == np.rint(TRUTH(GRID[10:30]) / GRID[1]).tolist()
    assert made[0, 5, 0] == 0 or TRUTH(GRID[5:6])[0] < GRID[1] / 2


def test_a_density_beyond_the_grid_is_no_crash():
    made = model_transitions([(Myers(r=10.0, theta=2.0, K=1e6), 0.01)], GRID)
    assert made[0, 40, -1] == 1


def test_the_true_model_as_a_process_gives_the_optimal_policy():
    points = np.linspace(0, 15, 120)
    process = GaussianProcess(x=points, y=TRUTH(points), length=1.0, noise=0.02, amplitude=8.0)
    mean, _ = process.posterior(GRID)
    assert np.allclose(mean, TRUTH(GRID), atol=0.05)
    found = solve(gp_transitions([process], GRID), GRID)
    assert np.allclose(found.escapement[22:], optimum().escapement[22:], atol=0.31)  # one cell


def test_posterior_is_that_of_a_joint_normal():
    x, y, at = np.array([1.0, 2.5, 4.0]), np.array([1.2, 2.0, 3.5]), np.array([0.0, 3.0, 9.0])
    process = GaussianProcess(x=x, y=y, length=2.0, noise=0.3, amplitude=1.5, mean=0.7, pinned=((0.5, 0.1),))
    seen = np.array([0.5, *x])
    together = np.concatenate([seen, at])
    full = 1.5**2 * np.exp(-0.5 * ((together[:, None] - together) / 2.0) ** 2)
    noisy = full[:4, :4] + np.diag([0, 0.09, 0.09, 0.09])
    gain = np.linalg.solve(noisy, full[:4, 4:]).T
    mean, variance = process.posterior(at)
    assert np.allclose(mean, 0.7 + gain @ (np.array([0.1, *y]) - 0.7), atol=1e-6)
    assert np.allclose(variance, np.diag(full[4:, 4:] - gain @ full[:4, 4:]), atol=1e-6)
    draws = process.draws(at, 20_000, np.random.default_rng(0))
    assert np.allclose(draws.mean(0), mean, atol=0.05)
    assert np.allclose(draws.var(0), variance, atol=0.06)


def test_it_goes_through_the_pinned_point_without_noise():
    mean, variance = GaussianProcess(x=X, y=Y, length=3.0, noise=0.4).posterior(np.zeros(1))
    assert mean[0] == pytest.approx(0, abs=1e-6)
    assert variance[0] < 1e-6


def test_more_noise_never_lowers_the_variance():
    noises = (0.01, 0.05, 0.2, 1.0, 5.0)
    found = [GaussianProcess(x=X, y=Y, length=2.0, noise=noise).posterior(GRID)[1] for noise in noises]
    for less, more in itertools.pairwise(found):
        assert (more >= less - 1e-9).all()


def test_the_log_posterior_has_half_the_determinant_and_the_jacobian():
    target, (length, noise) = LogPosterior(X[:6], Y[:6]), (2.0, 0.4)
    at = np.array([0.0, *X[:6]])

    def by_scipy(length, noise):
        covariance = np.exp(-0.5 * ((at[:, None] - at) / length) ** 2)
        covariance += np.diag([0, *[noise**2] * 6]) + 1e-9 * np.eye(7)
        likelihood = multivariate_normal.logpdf([0.0, *Y[:6]], np.zeros(7), covariance)
        priors = invgamma.logpdf(length, 10, scale=10) + invgamma.logpdf(noise, 5, scale=5)
        return likelihood + priors + np.log(length) + np.log(noise)

    mine = target(np.log([length, noise])) - target(np.log([3.0, 0.2]))
    assert mine == pytest.approx(by_scipy(length, noise) - by_scipy(3.0, 0.2), rel=1e-6)


def test_the_walk_draws_from_what_it_is_given():
    drawn = sample_hyperparameters(
        lambda logs: float(-0.5 * ((logs - [0.3, -0.5]) ** 2 / [0.04, 0.09]).sum()),
        np.random.default_rng(0),
        iterations=40_000,
        burn_in=1000,
        thin=5,
    )
    assert np.allclose(np.log(drawn).mean(0), [0.3, -0.5], atol=0.03)
    assert np.allclose(np.log(drawn).std(0), [0.2, 0.3], atol=0.03)


def test_most_likely_hyperparameters_are_a_maximum():
    target = LogPosterior(X, Y)
    length, noise = most_likely(target)
    best = target.likelihood(np.log([length, noise]))
    for factor in (0.8, 1.25):
        assert best >= target.likelihood(np.log([length * factor, noise]))
        assert best >= target.likelihood(np.log([length, noise * factor]))


def test_value_iteration_of_a_stock_that_regrows():
    grid = np.linspace(0, 2, 3)
    regrows = np.zeros((3, 3, 3))
    regrows[:, :, 2] = 1  # whatever is left, there are 2 next year
    policy = solve(regrows, grid, discount=0.5, tolerance=1e-12)
    assert policy.harvest.tolist() == [0, 1, 2]
    assert policy.value == pytest.approx([2.0, 3.0, 4.0], abs=1e-6)  # 2 a year: 2 / (1 - 0.5) = 4


def test_lognormal_rows_have_the_expected_spread():
    row = model_transitions([(TRUTH, 0.3)], np.linspace(0, 40, 161))[0, 30]
    mean = float(TRUTH(np.array([7.5]))[0])
    density = lambda v: np.exp(-0.5 * (np.log(v / mean) / 0.3) ** 2) / v  # noqa: E731
    wanted = quad(density, 0, mean)[0] / quad(density, 0, 40)[0]
    assert row[: int(mean / 0.25) + 1].sum() == pytest.approx(wanted, abs=0.03)


SERIES_FAULTS = [
    (np.array([5.0, 6.0]), "at least 3 stocks"),
    (np.array([5.0, 0.0, 6.0]), "stock 1 is 0, of which"),
    (np.array([5.0, 4.0, -1.0]), "no stock is below 0"),
    (np.array([5.0, 4.0, np.nan]), "must be a finite number"),
]


@pytest.mark.parametrize(("series", "message"), SERIES_FAULTS)
def test_series_that_are_none(series, message):
    with pytest.raises(ValueError, match=message):
        fit("Allen", series)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianProcess(x=X[:1], y=Y[:1], length=1.0, noise=0.1), r"from 1 point\(s\)"),
        (lambda: GaussianProcess(x=X, y=Y[:-1], length=1.0, noise=0.1), "equally long"),
        (lambda: GaussianProcess(x=X, y=Y * np.nan, length=1.0, noise=0.1), "NaN or infinity"),
        (lambda: GaussianProcess(x=X, y=Y, length=0.0, noise=0.1), "length=0.0 must be a positive"),
        (lambda: LogPosterior(X[:1], Y[:1]), r"from 1 point\(s\)"),
        (lambda: model_transitions([(TRUTH, 0.1)], np.linspace(1, 15, 50)), "begins with 0"),
        (lambda: model_transitions([(TRUTH, 0.1)], np.array([0.0, 1.0, 3.0])), "even steps"),
        (lambda: solve(np.ones((3, 3, 3)), np.linspace(0, 2, 3)), "sum to 1"),
        (lambda: solve(np.eye(3)[None].repeat(3, 0), np.linspace(0, 2, 3), discount=1.0), "discount=1.0"),
        (lambda: simulate(TRUTH, optimum(), start=-1.0), "is no stock"),
        (lambda: simulate(TRUTH, optimum(), noise=-1.0), "noise=-1.0 is no deviation"),
        (lambda: simulate(TRUTH, optimum(), noise=np.nan), "noise=nan is no deviation"),
        (lambda: model_transitions([(TRUTH, 0.0)], GRID), "finite number above 0"),
        (lambda: model_transitions([], GRID), "over no models"),
        (lambda: gp_transitions([], GRID), "over no models"),
        (lambda: optimum().at(np.array([1.0, -1.0])), "no stock is below 0"),
        (lambda: Allen(K=0.0), "Allen: K=0.0 must be a positive"),
        (lambda: Ricker(r=np.nan, K=8.0), "Ricker: r=nan"),
        (lambda: gp_policy(DATA, np.linspace(0, 5, 50)), "the grid ends at 5, below the largest stock"),
        (
            lambda: simulate_unharvested(TRUTH, start=-1.0, years=4, noise=0.1, rng=RNG),
            "no stock is below 0",
        ),
        (lambda: fit("Schaefer", DATA), "not one of Allen, Ricker, Myers"),
        (
            lambda: sample_hyperparameters(LogPosterior(X, Y), np.random.default_rng(0), iterations=5),
            "nothing",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_values_that_still_change_are_no_policy():
    with pytest.raises(RuntimeError, match="values still change by more than"):
        solve(model_transitions([(TRUTH, 0.05)], GRID), GRID, iterations=3)


def test_the_amplitude_may_depend_on_where():
    x, y, at = np.array([0.25, 0.75]), np.array([0.1, -0.2]), np.array([0.1, 0.5, 1.0])
    fades = lambda points: 0.4 * (1 - points)  # noqa: E731
    process = GaussianProcess(x=x, y=y, length=0.4, noise=0.05, amplitude=fades, pinned=())
    flat = GaussianProcess(x=x, y=y / fades(x), length=0.4, noise=1e-6, pinned=())
    mean, variance = process.posterior(at)
    kernel = lambda a, b: np.exp(-0.5 * ((a[:, None] - b) / 0.4) ** 2) * np.outer(fades(a), fades(b))  # noqa: E731
    gain = kernel(at, x) @ np.linalg.inv(kernel(x, x) + 0.05**2 * np.eye(2))
    assert np.allclose(mean, gain @ y, atol=1e-6)
    assert np.allclose(variance, np.diag(kernel(at, at) - gain @ kernel(x, at)), atol=1e-6)
    exact = GaussianProcess(x=x, y=y, length=0.4, noise=1e-6, amplitude=fades, pinned=())
    assert np.allclose(exact.posterior(at)[0], fades(at) * flat.posterior(at)[0], atol=1e-4)
    assert variance[-1] == pytest.approx(0, abs=1e-12)


def test_fresh_data_never_show_the_tipping_point():
    rng = np.random.default_rng(100)
    series = simulate_unharvested(TRUTH, start=5.5, years=40, noise=0.05, rng=rng)
    assert len(series) == 40
    assert series[0] == 5.5
    assert series[-10:].mean() == pytest.approx(8, abs=0.6)
