import math
from collections import Counter
from itertools import pairwise

import pytest
from moekit.moe.dropout.schedule import SCHEDULES, KSchedule

MONOTONE = sorted(SCHEDULES.keys() - {"constant", "random"})
ENDS = [(8, 16), (1, 16), (3, 13), (16, 8), (16, 1), (5, 5)]


def run(name, k_start, k_end, total_steps, num_experts=16):
    schedule = KSchedule(name, k_start, k_end, num_experts)
    return [schedule.active_experts(step, total_steps, 3) for step in range(total_steps + 1)]


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize(("k_start", "k_end"), ENDS)
@pytest.mark.parametrize("total_steps", [1, 2, 7, 300, 1009])
def test_each_schedule_goes_from_one_end_to_the_other_and_never_back(name, k_start, k_end, total_steps):
    ks = run(name, k_start, k_end, total_steps)
    assert (ks[0], ks[-1]) == (k_start, k_end)
    assert ks == sorted(ks, reverse=k_end < k_start)
    assert all(type(k) is int for k in ks)


@pytest.mark.parametrize("name", MONOTONE)
def test_long_trainings_take_every_value_the_schedule_has_and_end_in_the_last(name):
    ks = run(name, 8, 16, 4000)
    assert set(ks) == ({8, 16} if name == "stepped" else set(range(8, 17)))
    assert ks[-2] == 16


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_trained_model_has_k_end_and_keeps_it(name):
    schedule = KSchedule(name, 4, 4, 16) if name == "constant" else KSchedule(name, 2, 4, 16)
    assert [schedule.active_experts(step, 10, 3) for step in (10, 11, 1000)] == [4, 4, 4]


def released_k(mode, step, total_steps, smallest, largest):
    """The release's ``calculate_gate_number``, one mode after the other."""
    if mode == "linear_increase":
        k = round((largest - smallest) * step / total_steps) + smallest
    elif mode == "linear_decrease":
        k = round((smallest - largest) * step / total_steps) + largest
    elif mode == "cosine_increase":
        k = round((smallest - largest) * math.cos(math.pi * step / (2 * total_steps))) + largest
    elif mode == "cosine_decrease":
        k = round((largest - smallest) * math.cos(math.pi * step / (2 * total_steps))) + smallest
    elif mode == "exp_increase":
        k = round((smallest - largest) * 0.99 ** (step // (total_steps // 300))) + largest
    elif mode == "multi_step_increase":
        k = [1, 2, 4, 8, 16][int(5 * step / total_steps)]
    elif mode == "multi_step_decrease":
        k = [16, 8, 4, 2, 1][int(5 * step / total_steps)]
    return min(max(k, smallest), largest)


@pytest.mark.parametrize(("smallest", "largest"), [(8, 16), (1, 16), (3, 10)])
@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_linear_is_the_release_at_every_step(smallest, largest, direction):
    k_start, k_end = (smallest, largest) if direction == "increase" else (largest, smallest)
    released = [released_k(f"linear_{direction}", t, 997, smallest, largest) for t in range(998)]
    assert run("linear", k_start, k_end, 997) == released


@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_cosine_is_the_release_at_every_step(direction):
    k_start, k_end = (8, 16) if direction == "increase" else (16, 8)
    released = [released_k(f"cosine_{direction}", t, 997, 8, 16) for t in range(998)]
    assert run("cosine", k_start, k_end, 997) == released


@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_stepped_from_1_to_16_is_the_release_at_every_step(direction):
    k_start, k_end = (1, 16) if direction == "increase" else (16, 1)
    released = [released_k(f"multi_step_{direction}", t, 1000, 1, 16) for t in range(1000)]
    assert run("stepped", k_start, k_end, 1000)[:-1] == released


def test_exponential_stays_within_one_of_the_release_and_closes_the_gap_it_leaves():
    released = [released_k("exp_increase", t, 3000, 1, 16) for t in range(3001)]
    ours = run("exponential", 1, 16, 3000)
    assert {k - r for k, r in zip(ours, released, strict=True)} == {0, 1}
    assert (released[-1], ours[-1]) == (15, 16)


def test_values_by_hand():
    assert run("linear", 8, 16, 8) == [8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert run("linear", 1, 2, 4) == [1, 1, 1, 2, 2]  # 0.5 is rounded to the even 0
    assert run("constant", 3, 3, 4) == [3, 3, 3, 3, 3]
    assert run("stepped", 1, 16, 5) == [1, 2, 4, 8, 16, 16]
    assert run("stepped", 3, 16, 8) == [3, 3, 6, 6, 12, 12, 16, 16, 16]
    assert run("stepped", 16, 3, 4) == [16, 12, 6, 3, 3]
    # Half-way: 1 - cos(pi / 4) = 0.29; (1 - 0.99^150) / (1 - 0.99^300) = 0.82
    assert run("cosine", 1, 11, 2)[1] == 4
    assert run("exponential", 1, 11, 2)[1] == 9


def test_random_is_uniform_with_both_ends_independent_of_layer_and_step():
    schedule = KSchedule("random", 2, 5, 16, seed=3)
    draws = [schedule.active_experts(step, 6000, 2) for step in range(6000)]
    pairs = Counter(draws)
    assert set(pairs) == {(a, b) for a in range(2, 6) for b in range(2, 6)}
    # 16 cells of 375 expected: chi-square with 15 degrees of freedom, 37.7 at 0.1%.
    assert sum((n - 375) ** 2 / 375 for n in pairs.values()) < 37.7
    repeats = sum(a[0] == b[0] for a, b in pairwise(draws))
    assert 0.22 < repeats / 6000 < 0.28


def test_random_depends_on_seed_step_and_layer_alone():
    schedule = KSchedule("random", 1, 16, 16, seed=7)
    whole = [schedule.active_experts(step, 50, 8) for step in range(50)]
    later = [KSchedule("random", 1, 16, 16, seed=7).active_experts(step, 99, 4) for step in range(20, 50)]
    assert later == [ks[:4] for ks in whole[20:]]
    assert len(set(whole)) == 50
    assert whole != [KSchedule("random", 1, 16, 16, seed=8).active_experts(step, 50, 8) for step in range(50)]
    assert KSchedule("random", 16, 1, 16, seed=7).active_experts(0, 50, 8) == whole[0]


def test_random_numbers_do_not_change_from_release_to_release():
    assert KSchedule("random", 1, 16, 16).active_experts(0, 10, 4) == (1, 5, 4, 13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 0, 16, 16), "k_start=0 is not between 1 and 16 experts"),
        (("linear", 8, 17, 16), "k_end=17 is not between 1 and 16 experts"),
        (("random", -1, 4, 8), "k_start=-1 is not between 1 and 8 experts"),
        (("linear", True, 4, 8), "k_start=True is not between 1 and 8 experts"),
        (("quadratic", 1, 4, 8), "schedule='quadratic' is not one of constant, linear"),
        (("constant", 4, 8, 8), "'constant' has one number of experts, got k_start=4 and k_end=8"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KSchedule(*arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step=-1 is negative"):
        KSchedule("linear", 1, 4, 4).active_experts(-1, 10, 1)
