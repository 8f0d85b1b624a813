"""Partitions: each neuron in one expert, planted groups found, the assignment as cheap as can be."""

# T tokens, F neurons, E experts, I neurons of an expert

import math
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from moekit.moe.dropout.partition import (
    assign_equally,
    check_divides,
    coactivation_partition,
    contiguous_partition,
    random_partition,
    representative_neurons,
    shared_partition,
    weight_partition,
)
from moekit.moe.weights import ExpertWeights
from scipy.optimize import linear_sum_assignment

SIZES = [(24, 1), (24, 4), (24, 24), (60, 5)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ffn(rows_FD, gated=True):
    other = noise(*rows_FD.shape).to(rows_FD)
    return ExpertWeights(up=other if gated else rows_FD, gate=rows_FD if gated else None, down=other.T)


PARTITIONS = {
    "contiguous": lambda num, experts, seed=0: contiguous_partition(num, experts),
    "random": random_partition,
    "weights": lambda num, experts, seed=0: weight_partition(ffn(noise(num, 8)), experts, seed),
    "coactivation": lambda num, experts, seed=0: coactivation_partition(noise(40, num), experts, seed),
    "shared": lambda num, experts, seed=0: shared_partition(noise(40, num), experts, experts // 2, seed),
}


def planted(num_neurons, num_experts, seed=0):
    """A random partition in the order in which the functions return theirs."""
    groups_EI = random_partition(num_neurons, num_experts, seed)
    return groups_EI[groups_EI[:, 0].argsort()]


def planted_rows(groups_EI, width=16):
    """Rows of very different lengths near one direction for each group."""
    rows_FD = torch.empty(groups_EI.numel(), width)
    for neurons, direction in zip(groups_EI, noise(len(groups_EI), width, seed=1), strict=True):
        rows_FD[neurons] = direction + 0.3 * noise(len(neurons), width, seed=int(neurons[0]))
    return rows_FD * noise(groups_EI.numel(), 1, seed=2).exp()


def planted_activations(groups_EI, num_tokens=64):
    """Each token makes one group fire, either sign, over noise."""
    activations_TF = 0.1 * noise(num_tokens, groups_EI.numel())
    for token in range(num_tokens):
        neurons = groups_EI[token % len(groups_EI)]
        activations_TF[token, neurons] += torch.where(noise(len(neurons), seed=token) > 0, 2.0, -2.0)
    return activations_TF


@pytest.mark.parametrize(("num_neurons", "num_experts"), SIZES)
@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_neuron_is_in_one_expert_and_experts_are_equal(kind, num_neurons, num_experts):
    partition_EI = PARTITIONS[kind](num_neurons, num_experts)
    assert partition_EI.shape == (num_experts, num_neurons // num_experts)
    assert partition_EI.dtype == torch.long
    assert torch.equal(partition_EI.flatten().sort().values, torch.arange(num_neurons))
    assert torch.equal(partition_EI, partition_EI.sort(dim=1).values)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_seed_gives_one_partition_and_leaves_the_global_generator_alone(kind):
    before = torch.get_rng_state()
    first = PARTITIONS[kind](60, 5, 7)
    assert torch.equal(first, PARTITIONS[kind](60, 5, 7))
    assert torch.equal(before, torch.get_rng_state())
    if kind != "contiguous":
        assert not torch.equal(first, PARTITIONS[kind](60, 5, 8))


def test_contiguous_by_hand():
    assert contiguous_partition(6, 3).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("num_experts", [0, -4, 16])
def test_a_number_of_experts_that_does_not_divide_is_refused(kind, num_experts):
    with pytest.raises(
        ValueError, match=f"{num_experts} experts do not divide an FFN of width 60; possible: 2"
    ):
        PARTITIONS[kind](60, num_experts)


@pytest.mark.parametrize(
    ("num_neurons", "possible"),
    [(1000, "2, 4, 5, 8, 10, 20, 25, 40, 50, ..."), (12, "2, 3, 4, 6, 12"), (7, "7")],
)
def test_the_divisors_are_named(num_neurons, possible):
    message = f"16 experts do not divide an FFN of width {num_neurons}; possible: {possible}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_divides(num_neurons, 16)


COSTS = {
    "normal": lambda rng: rng.normal(size=(60, 5)),
    "one cluster is cheap": lambda rng: rng.normal(size=(60, 5)) + np.array([0, 9, 9, 9, 9]),
    "many ties": lambda rng: rng.integers(0, 3, size=(60, 5)).astype(float),
    "half the rows are zero": lambda rng: rng.normal(size=(60, 5)) * (np.arange(60) % 2)[:, None],
    "all equal": lambda rng: np.ones((60, 5)),
    "one cluster": lambda rng: rng.normal(size=(60, 1)),
    "one row each": lambda rng: rng.normal(size=(20, 20)),
    "large": lambda rng: 1e6 * rng.normal(size=(60, 5)),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", COSTS)
def test_the_equal_assignment_is_the_cheapest(kind, seed):
    rng = np.random.default_rng(seed)
    costs_FE = COSTS[kind](rng)
    num_rows, num_clusters = costs_FE.shape
    start_F = rng.integers(0, num_clusters, size=num_rows)
    prices_E = rng.normal(size=num_clusters) * (seed % 2)

    labels_F, prices_E = assign_equally(costs_FE, start_F, prices_E)

    assert (np.bincount(labels_F) == num_rows // num_clusters).all()
    repeated_FF = costs_FE.repeat(num_rows // num_clusters, axis=1)
    least = repeated_FF[linear_sum_assignment(repeated_FF)].sum()
    chosen_F = np.arange(num_rows), labels_F
    assert costs_FE[chosen_F].sum() == pytest.approx(least, rel=1e-9, abs=1e-9)
    priced_FE = costs_FE + prices_E
    slack = 1e-9 * np.abs(costs_FE).max()
    assert (priced_FE[chosen_F] <= priced_FE.min(1) + slack).all()


def test_rows_stay_where_nothing_is_cheaper():
    labels_F = np.array([1, 0, 0, 1, 2, 2])
    again_F, _ = assign_equally(np.ones((6, 3)), labels_F, np.zeros(3))
    assert again_F.tolist() == labels_F.tolist()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_planted_groups_of_weights_are_found(gated, dtype, seed):
    groups_EI = planted(48, 6, seed)
    weights = ffn(planted_rows(groups_EI).to(dtype), gated)
    assert torch.equal(weight_partition(weights, 6, seed), groups_EI)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_planted_groups_of_activations_are_found(dtype, seed):
    groups_EI = planted(48, 6, seed)
    activations_TF = planted_activations(groups_EI).to(dtype)
    assert torch.equal(coactivation_partition(activations_TF, 6, seed), groups_EI)


def test_only_which_neurons_are_strongest_matters():
    activations_TF = noise(50, 24)
    scaled_TF = -activations_TF * noise(50, 1, seed=1).exp()
    assert torch.equal(coactivation_partition(scaled_TF, 4), coactivation_partition(activations_TF, 4))


def test_neurons_that_are_zero_do_not_fire():
    activations_TF = torch.zeros(40, 24)
    activations_TF[torch.arange(40), noise(40, 24).argmax(1)] = 1.0
    one = coactivation_partition(activations_TF, 4, num_active=1)
    assert torch.equal(one, coactivation_partition(activations_TF, 4, num_active=9))


def count_meetings(fires_TF, partition_EI):
    meetings = 0
    for neurons in partition_EI.tolist():
        for first, second in combinations(neurons, 2):
            meetings += int((fires_TF[:, first] * fires_TF[:, second]).sum())
    return meetings


def test_groups_fire_together_more_than_any_random_ones():
    activations_TF = noise(80, 20) + 2 * noise(80, 4, seed=1) @ noise(4, 20, seed=2)
    fires_TF = torch.zeros(80, 20).scatter(1, activations_TF.abs().topk(5).indices, 1.0)
    found = count_meetings(fires_TF, coactivation_partition(activations_TF, 4))
    by_chance = [count_meetings(fires_TF, random_partition(20, 4, seed)) for seed in range(200)]
    assert found > max(by_chance)


@pytest.mark.parametrize(
    "partition", [coactivation_partition, lambda *args, **kwargs: shared_partition(*args, 1, **kwargs)]
)
def test_activations_that_say_nothing_are_refused(partition):
    with pytest.raises(ValueError, match="activations are of no token"):
        partition(torch.empty(0, 24), 4)
    for num_active in (0, 25, -1):
        with pytest.raises(ValueError, match=f"num_active={num_active} is not between 1 and 24 neurons"):
            partition(noise(8, 24), 4, num_active=num_active)
    for value in (math.nan, math.inf):
        activations_TF = noise(8, 24)
        activations_TF[3, 5] = value
        with pytest.raises(ValueError, match="the activations hold NaN or infinity"):
            partition(activations_TF, 4)


def test_weights_that_are_not_finite_are_refused():
    rows_FD = noise(24, 8)
    rows_FD[3, 5] = math.nan
    with pytest.raises(ValueError, match="the weights hold NaN or infinity"):
        weight_partition(ffn(rows_FD), 4)


def test_equal_neurons_are_dealt_equally():
    assert weight_partition(ffn(torch.ones(24, 8)), 4).shape == (4, 6)
    assert weight_partition(ffn(torch.zeros(24, 8)), 4).shape == (4, 6)
    assert coactivation_partition(torch.zeros(9, 24), 4).shape == (4, 6)


@pytest.mark.parametrize("seed", range(4))
def test_planted_shared_neurons_come_first(seed):
    groups_EI = planted(48, 6, seed)
    often, seldom, routed_EI = groups_EI[2], groups_EI[4], groups_EI[[0, 1, 3, 5]]
    activations_TF = torch.zeros(64, 48)
    for token in range(64):
        activations_TF[token, routed_EI[token % 4]] = 1.0
    activations_TF[:, often] = 3.0
    activations_TF[:50, seldom] = 2.0
    found_EI = shared_partition(activations_TF, 6, 2, seed, num_active=24)
    assert torch.equal(found_EI, torch.cat([often[None], seldom[None], routed_EI]))


def test_shared_neurons_are_those_that_fire_most():
    activations_TF = noise(60, 24) * noise(24, seed=1).exp()
    partition_EI = shared_partition(activations_TF, 4, 1, num_active=5)
    rates_F = torch.zeros(24)
    for row in activations_TF:
        rates_F[row.abs().argsort(descending=True)[:5]] += 1
    assert rates_F[partition_EI[0]].min() >= rates_F[partition_EI[1:]].max()


def test_without_shared_experts_it_is_the_coactivation_partition():
    activations_TF = noise(60, 24)
    assert torch.equal(
        shared_partition(activations_TF, 4, 0, 3), coactivation_partition(activations_TF, 4, 3)
    )


@pytest.mark.parametrize("num_shared", [-1, 4])
def test_a_number_of_shared_experts_out_of_range_is_refused(num_shared):
    with pytest.raises(ValueError, match=f"num_shared={num_shared} is not between 0 and 3 of 4 experts"):
        shared_partition(noise(8, 24), 4, num_shared)


def slow_representatives(activations_TF, partition_EI, num_active):
    fires_FT = [[0.0] * len(activations_TF) for _ in range(activations_TF.shape[1])]
    for token, row in enumerate(activations_TF.abs().tolist()):
        for neuron in sorted(range(len(row)), key=lambda n: -row[n])[:num_active]:
            fires_FT[neuron][token] = 1.0
    chosen = []
    for neurons in partition_EI.tolist():
        mean = [sum(fires_FT[n][t] for n in neurons) / len(neurons) for t in range(len(activations_TF))]
        cosines = []
        for neuron in neurons:
            dot = sum(a * b for a, b in zip(fires_FT[neuron], mean, strict=True))
            cosines.append(dot / max(math.sqrt(sum(fires_FT[neuron])), 1e-12))
        chosen.append(neurons[max(range(len(neurons)), key=lambda i: cosines[i])])
    return chosen


@pytest.mark.parametrize("num_active", [None, 3, 24])
def test_representatives_are_the_slow_reference(num_active):
    activations_TF = noise(50, 24) * noise(24, seed=1).exp()
    partition_EI = shared_partition(activations_TF, 6, 2)[2:]
    actual_E = representative_neurons(activations_TF, partition_EI, num_active=num_active)
    assert actual_E.tolist() == slow_representatives(activations_TF, partition_EI, num_active or 4)


def test_a_representative_fires_with_its_expert():
    activations_TF = torch.zeros(8, 6)
    activations_TF[:4, 0] = activations_TF[:3, 1] = activations_TF[4:, 3:] = 1.0
    # Neuron 2 never fires, and by L2 distance it would be the nearest to the mean (4, 3 and 0 tokens of 8).
    assert representative_neurons(activations_TF, contiguous_partition(6, 2)).tolist() == [0, 3]
