"""Group counts, dominant experts and group membership."""

import pytest
import torch
from moekit.compress.grouping import (
    adaptive_group_counts,
    assign_groups,
    dominant_experts,
    group_members,
    most_used_members,
    random_groups,
    uniform_group_counts,
)

TWO_LAYERS = [torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.4, 0.35, 0.2, 0.05])]
TIED_LAYERS = [torch.tensor([0.4, 0.3, 0.3, 0.0]), torch.tensor([0.7, 0.3, 0.0, 0.0])]


def random_similarity(num_experts):
    features = torch.randn(num_experts, 4, dtype=torch.float64)
    return torch.cosine_similarity(features[:, None], features[None], dim=-1)


def test_adaptive_counts_worked_by_hand():
    # Pooled with each maximum at 1: 1, 1, .35, .3 | .2, .15, .05, .05.
    for ties in ("exact", "strict"):
        counts = adaptive_group_counts(TWO_LAYERS, 2, ties=ties)
        assert (counts.num_groups, counts.requested, counts.actual) == ((2, 2), 4, 4)


def test_ties_at_the_threshold():
    # Pooled: 1, 1, .3, .3 | .3, 0, 0, 0: the published rule drops all three that tie.
    usage = [(layer_E * 10).round().long() for layer_E in TIED_LAYERS]
    strict = adaptive_group_counts(usage, 2, ties="strict")
    assert (strict.num_groups, strict.requested, strict.actual) == ((1, 1), 4, 2)
    exact = adaptive_group_counts(usage, 2)
    assert (exact.num_groups, exact.requested, exact.actual) == ((3, 1), 4, 4)


def test_excluded_layers_keep_everything_and_count_in_the_total():
    # 2 groups for one merged layer and 4 experts of the other: entry 6 of 1, 1, 1, 1, 1, .35 | .2, .05.
    for ties in ("exact", "strict"):
        counts = adaptive_group_counts(TWO_LAYERS, 2, excluded=[0], ties=ties)
        assert (counts.num_groups, counts.requested) == ((4, 2), 6)


def test_a_layer_of_one_busy_expert_gives_its_groups_to_the_others():
    usage = [torch.tensor([97, 1, 1, 1]), torch.tensor([25, 25, 25, 25])]
    assert adaptive_group_counts(usage, 2.5).num_groups == (1, 4)
    assert adaptive_group_counts(usage, 2.5, minimum=2).num_groups == (2, 3)


@pytest.mark.parametrize("ties", ["exact", "strict"])
@pytest.mark.parametrize("seed", range(5))
def test_adaptive_counts_stay_in_their_bounds(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    usage = [torch.randint(0, 6, (size,), generator=generator) for size in (8, 16, 8, 12)]
    for average in (2, 3.5, 7, 11):
        counts = adaptive_group_counts(usage, average, minimum=2, ties=ties)
        assert all(2 <= m <= len(u) for m, u in zip(counts.num_groups, usage, strict=True))
        assert counts.requested == round(average * 4)
        assert counts.actual <= counts.requested if ties == "strict" else counts.actual == counts.requested


def test_adaptive_counts_match_the_published_rule_without_ties():
    usage = [torch.rand(16, dtype=torch.float64) for _ in range(6)]
    shares = [layer_E / layer_E.sum() for layer_E in usage]
    for layer_E in shares:
        layer_E[layer_E.argmax()] = 1.0
    threshold = torch.cat(shares).sort(descending=True).values[6 * 5]
    expected = tuple(int((layer_E > threshold).sum()) for layer_E in shares)
    assert adaptive_group_counts(usage, 5).num_groups == expected
    assert adaptive_group_counts(usage, 5, ties="strict").num_groups == expected
    assert sum(expected) == 30


def test_only_frequencies_matter_not_the_number_of_tokens():
    usage = [torch.tensor([3, 5, 1, 1]), torch.tensor([4, 3, 2, 1])]
    scaled = [usage[0] * 10, usage[1] * 7]
    assert adaptive_group_counts(usage, 2) == adaptive_group_counts(scaled, 2)


def test_layers_nobody_used_still_get_their_minimum():
    counts = adaptive_group_counts([torch.zeros(4), torch.ones(4)], 2, minimum=1)
    assert counts.num_groups == (1, 3)


@pytest.mark.parametrize("ties", ["exact", "strict"])
def test_all_experts_can_be_kept(ties):
    assert adaptive_group_counts(TIED_LAYERS, 4, ties=ties).num_groups == (4, 4)
    assert adaptive_group_counts(TIED_LAYERS, 4, excluded=[0, 1], ties=ties).num_groups == (4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_groups": 5}, "average_groups=5 is not between 1 and 4"),
        ({"average_groups": 1, "minimum": 2}, "average_groups=1 is not between 2 and 4"),
        ({"average_groups": float("nan")}, "average_groups=nan"),
        ({"average_groups": 2, "minimum": 5}, r"minimum=5 is not between 1 and 4 experts \(layer 0\)"),
        ({"average_groups": 2, "minimum": 0}, "minimum=0"),
        ({"average_groups": 2, "excluded": [2]}, r"excluded layers \[2\] do not exist"),
        ({"average_groups": 2, "ties": "loose"}, "ties='loose' is not one of exact, strict"),
    ],
)
def test_adaptive_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_group_counts(TWO_LAYERS, **options)


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], []])
def test_broken_counts_are_refused(bad):
    with pytest.raises(ValueError, match="counts of layer 1"):
        adaptive_group_counts([torch.ones(2), torch.tensor(bad)], 1, excluded=[1])
    with pytest.raises(ValueError, match="counts of the layer"):
        dominant_experts(torch.tensor(bad), 1)


def test_uniform_counts():
    counts = uniform_group_counts([8, 8, 4], 3, excluded=[2], minimum=2)
    assert (counts.num_groups, counts.requested, counts.actual) == ((3, 3, 4), 10, 10)
    with pytest.raises(ValueError, match=r"num_groups=9 is not between 1 and 8 experts \(layer 0\)"):
        uniform_group_counts([8, 8], 9)
    with pytest.raises(ValueError, match="num_groups=1 is not between 2 and 8"):
        uniform_group_counts([8], 1, minimum=2)


def test_dominant_experts_are_the_most_used_and_ties_go_to_the_lower_id():
    counts_E = torch.tensor([2, 9, 5, 5, 0, 5])
    assert dominant_experts(counts_E, 1).tolist() == [1]
    assert dominant_experts(counts_E, 3).tolist() == [1, 2, 3]
    assert dominant_experts(counts_E, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert dominant_experts(torch.zeros(4), 2).tolist() == [0, 1]
    for num_groups in (0, 7):
        with pytest.raises(ValueError, match=f"num_groups={num_groups} is not between 1 and 6"):
            dominant_experts(counts_E, num_groups)


def test_experts_join_the_leader_they_resemble():
    similarity_EE = torch.tensor(
        [[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.4], [0.9, 0.3, 0.4, 1.0]]
    )
    assert assign_groups(similarity_EE, torch.tensor([5, 4, 1, 2]), [0, 1]).tolist() == [0, 1, 1, 0]
    assert assign_groups(similarity_EE, torch.tensor([5, 4, 1, 2]), [1, 0]).tolist() == [1, 0, 0, 1]


def slow_assignment(similarity_EE, counts_E, leaders, capacity):
    num_experts = len(counts_E)
    label = {leader: index for index, leader in enumerate(leaders)}
    waiting = [expert for expert in range(num_experts) if expert not in label]
    while waiting:
        expert = waiting[0]
        for other in waiting:
            if counts_E[other] > counts_E[expert]:
                expert = other
        waiting.remove(expert)
        best = None
        for leader in leaders:
            if sum(joined == label[leader] for joined in label.values()) >= capacity:
                continue
            key = (float(similarity_EE[expert, leader]), float(counts_E[leader]), -leader)
            if best is None or key > best[0]:
                best = (key, leader)
        label[expert] = label[best[1]]
    return [label[expert] for expert in range(num_experts)]


@pytest.mark.parametrize("capacity", [None, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_assignment_equals_the_slow_reference(seed, capacity):
    torch.manual_seed(seed)
    similarity_EE = (random_similarity(12) * 4).round()  # coarse, so that many are equal
    counts_E = torch.randint(0, 5, (12,))
    leaders = dominant_experts(counts_E, 6)
    groups_E = assign_groups(similarity_EE, counts_E, leaders, capacity=capacity)
    assert groups_E.tolist() == slow_assignment(similarity_EE, counts_E, leaders.tolist(), capacity or 12)
    assert groups_E.bincount(minlength=6).max() <= (capacity or 12)


def test_a_full_group_sends_the_less_used_elsewhere():
    # Everyone likes leader 0 best; expert 3 is used more than expert 2 and takes the last place.
    similarity_EE = torch.tensor(
        [[1.0, 0.0, 0.9, 0.8], [0.0, 1.0, 0.1, 0.1], [0.9, 0.1, 1.0, 0.0], [0.8, 0.1, 0.0, 1.0]]
    )
    counts_E = torch.tensor([9, 8, 1, 2])
    assert assign_groups(similarity_EE, counts_E, [0, 1], capacity=2).tolist() == [0, 1, 1, 0]
    with pytest.raises(
        ValueError, match="capacity=1 is too small for 4 experts in 2 groups; allow at least 2"
    ):
        assign_groups(similarity_EE, counts_E, [0, 1], capacity=1)


def test_as_many_groups_as_experts_is_the_identity():
    counts_E = torch.randint(0, 9, (7,))
    groups_E = assign_groups(random_similarity(7), counts_E, dominant_experts(counts_E, 7))
    assert groups_E.tolist() == list(range(7))


def test_equal_similarities_join_the_most_used_leader():
    groups_E = assign_groups(torch.ones(4, 4), torch.tensor([1, 3, 5, 1]), [1, 2])
    assert groups_E.tolist() == [1, 0, 1, 1]
    assert assign_groups(torch.ones(4, 4), torch.zeros(4), [2, 3]).tolist() == [0, 0, 0, 1]


def published_uniform_loop(similarity_EE, counts_E, num_groups):
    """The release's loop over expert ids M..E-1; -1 where it never assigns."""
    ranking = torch.argsort(counts_E, descending=True)
    labels_E = torch.full((len(counts_E),), -1)
    labels_E[ranking[:num_groups]] = torch.arange(num_groups)
    for expert in range(num_groups, len(counts_E)):
        leader = ranking[similarity_EE[expert, ranking[:num_groups]].argmax()]
        labels_E[expert] = labels_E[leader]
    return labels_E


def test_nobody_is_left_out_where_the_published_loop_forgets_six_of_32():
    forgotten = 0
    for _ in range(200):
        counts_E, similarity_EE = torch.randperm(32), random_similarity(32)
        forgotten += int((published_uniform_loop(similarity_EE, counts_E, 8) < 0).sum())
        groups_E = assign_groups(similarity_EE, counts_E, dominant_experts(counts_E, 8))
        assert groups_E.min() >= 0
        assert groups_E.unique().tolist() == list(range(8))
    assert forgotten / 200 == pytest.approx(8 * (1 - 8 / 32), abs=0.4)


@pytest.mark.parametrize(
    ("leaders", "message"), [([], "distinct ids"), ([0, 0], "distinct ids"), ([0, 4], "between 0 and 3")]
)
def test_impossible_leaders_are_refused(leaders, message):
    with pytest.raises(ValueError, match=message):
        assign_groups(random_similarity(4), torch.ones(4), leaders)


def test_nan_similarities_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        assign_groups(torch.full((3, 3), float("nan")), torch.ones(3), [0])


def test_random_groups_are_complete_and_repeatable():
    for seed in range(20):
        groups_E = random_groups(16, 6, seed)
        assert groups_E.unique().tolist() == list(range(6))
        assert torch.equal(groups_E, random_groups(16, 6, seed))
    assert not torch.equal(random_groups(16, 6, 0), random_groups(16, 6, 1))
    with pytest.raises(ValueError, match="num_groups=5 is not between 1 and 4"):
        random_groups(4, 5, 0)


def test_members_and_their_most_used():
    groups_E = torch.tensor([1, 0, 1, 0])
    assert group_members(groups_E, 2) == [[1, 3], [0, 2]]
    assert most_used_members(groups_E, torch.tensor([2, 1, 2, 4])).tolist() == [3, 0]
    with pytest.raises(ValueError, match="group 1 of 3 is empty"):
        most_used_members(torch.tensor([0, 2]), torch.ones(2))
    with pytest.raises(ValueError, match="expert 1 is in group 2"):
        group_members(torch.tensor([0, 2]), 2)
