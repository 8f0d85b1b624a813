"""Merging: equal experts merge without loss, one alone is itself, weights sum to 1 whatever the counts."""

import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from moekit.compress.alignment import Alignment, align_expert, permute_expert
from moekit.compress.grouping import assign_groups, dominant_experts
from moekit.compress.merging import group_weights, merge_experts, merge_groups
from moekit.moe.weights import ExpertWeights


def make_expert(dtype=torch.float32, gate=True, bias=True, width=16, hidden=6):
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    if gate:
        shapes["gate"] = (width, hidden)
    if bias:
        shapes |= {"up_bias": (width,), "down_bias": (hidden,)}
    if bias and gate:
        shapes["gate_bias"] = (width,)
    return ExpertWeights(**{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()})


def scalar_expert(value):
    return ExpertWeights(up=torch.full((1, 1), value), down=torch.full((1, 1), -value))


def run(expert, inputs):
    up = F.linear(inputs, expert.up, expert.up_bias)
    hidden = (
        F.relu(up) if expert.gate is None else F.silu(F.linear(inputs, expert.gate, expert.gate_bias)) * up
    )
    return F.linear(hidden, expert.down, expert.down_bias)


def assert_bitwise(expert, other):
    mine, theirs = dict(expert.named_tensors()), dict(other.named_tensors())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype
        assert torch.equal(mine[name], theirs[name])
        assert torch.equal(mine[name].signbit(), theirs[name].signbit())


def assert_experts_close(expert, other, **tolerance):
    for name, tensor in expert.named_tensors():
        torch.testing.assert_close(tensor, getattr(other, name), **tolerance)


@pytest.mark.parametrize("weight", [3, 0.1, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_expert_alone_comes_back_bit_for_bit(dtype, weight):
    expert = make_expert(dtype)
    expert.up[0, 0] = -0.0
    merged = merge_experts([expert], [weight])
    assert_bitwise(merged, expert)
    for name, tensor in merged.named_tensors():
        assert tensor.data_ptr() != getattr(expert, name).data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("gate", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_equal_experts_merge_into_themselves(dtype, gate, bias):
    expert = make_expert(dtype, gate, bias)
    assert_experts_close(merge_experts([expert] * 3, [7, 2, 1]), expert, atol=1e-6, rtol=1e-6)


def test_the_mean_is_weighted():
    merged = merge_experts([scalar_expert(1.0), scalar_expert(5.0)], [3, 1])
    assert (merged.up.item(), merged.down.item()) == (2.0, -2.0)
    merged = merge_experts([scalar_expert(1.0), scalar_expert(5.0)], torch.tensor([3, 1]))
    assert merged.up.item() == 2.0


def test_members_that_nobody_used_are_averaged_and_not_zero():
    merged = merge_experts([scalar_expert(1.0), scalar_expert(5.0)], [0, 0])
    assert merged.up.item() == 3.0


@pytest.mark.parametrize("first_weight", [0, 1])
def test_an_expert_of_weight_zero_is_not_read(first_weight):
    experts = [scalar_expert(float("inf")), scalar_expert(2.0)]
    experts, weights = (experts[::-1], [1, 0]) if first_weight else (experts, [0, 1])
    assert merge_experts(experts, weights).up.item() == 2.0


def test_bfloat16_is_summed_in_float32():
    experts = [make_expert(torch.bfloat16) for _ in range(16)]
    weights = torch.rand(16, dtype=torch.float64)
    merged = merge_experts(experts, weights)
    exact = sum(w * e.up.double() for w, e in zip(weights / weights.sum(), experts, strict=True))
    assert merged.up.dtype == torch.bfloat16
    # Less than half of the last of bfloat16's eight bits, plus what float32 loses.
    torch.testing.assert_close(merged.up.double(), exact, atol=1e-6, rtol=2**-8)


def test_only_one_expert_lives_at_a_time():
    made, alive = [], []

    def stream():
        for value in (1.0, 2.0, 3.0):
            alive.append(sum(reference() is not None for reference in made))
            expert = scalar_expert(value)
            made.append(weakref.ref(expert.up))
            yield expert
            del expert

    assert merge_experts(stream(), [1, 1, 1]).up.item() == pytest.approx(2.0)
    assert alive == [0, 0, 0]


def test_merging_builds_no_graph():
    experts = [ExpertWeights(**{n: torch.nn.Parameter(t) for n, t in make_expert().named_tensors()})] * 2
    assert not merge_experts(experts, [1, 1]).up.requires_grad
    assert not merge_groups(experts, torch.tensor([0, 0]), torch.ones(2), [0])[0].up.requires_grad


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_broken_weights_are_refused(weights):
    with pytest.raises(ValueError, match="counts of the merge"):
        merge_experts([scalar_expert(1.0)] * 2, weights)


@pytest.mark.parametrize("num_experts", [0, 1, 3])
def test_each_expert_needs_a_weight(num_experts):
    with pytest.raises(ValueError, match="got 2 weights for"):
        merge_experts([scalar_expert(1.0)] * num_experts, [1.0, 1.0])


def test_different_layouts_are_refused():
    with pytest.raises(ValueError, match="expert 1 and expert 0 have different layouts"):
        merge_experts([make_expert(), make_expert(gate=False)], [1, 1])
    with pytest.raises(ValueError, match="different layouts"):
        merge_experts([make_expert(), make_expert(torch.bfloat16)], [1, 1])


def test_group_weights_sum_to_one_and_survive_groups_that_nobody_used():
    groups_E, counts_E = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([3, 0, 1, 0, 7])
    assert group_weights(groups_E, counts_E).tolist() == [0.75, 0.5, 0.25, 0.5, 1.0]
    assert group_weights(groups_E, counts_E, weighting="equal").tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    for weighting in ("frequency", "equal"):
        counts_E = torch.randint(0, 3, (64,))
        groups_E = torch.arange(64) % 13
        totals_M = torch.zeros(13, dtype=torch.float64)
        totals_M.index_add_(0, groups_E, group_weights(groups_E, counts_E, weighting=weighting))
        torch.testing.assert_close(totals_M, torch.ones_like(totals_M))


def test_as_many_groups_as_experts_is_the_identity():
    experts = [make_expert(torch.bfloat16) for _ in range(6)]
    counts_E = torch.tensor([4, 0, 9, 1, 1, 0])
    dominant = dominant_experts(counts_E, 6)
    groups_E = assign_groups(torch.eye(6), counts_E, dominant)
    for reference in ("dominant", "first"):
        merged = merge_groups(experts, groups_E, counts_E, dominant, reference=reference)
        for expert, original in zip(merged, experts, strict=True):
            assert_bitwise(expert, original)


@pytest.mark.parametrize("reference", ["dominant", "first"])
@pytest.mark.parametrize("weighting", ["frequency", "equal"])
@pytest.mark.parametrize(("gate", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_shuffled_copies_merge_without_loss(gate, bias, weighting, reference):
    originals = [make_expert(gate=gate, bias=bias) for _ in range(2)]
    experts = [permute_expert(originals[index % 2], torch.randperm(16)) for index in range(6)]
    merged = merge_groups(
        experts,
        torch.tensor([1, 0, 1, 0, 1, 0]),
        torch.tensor([1, 9, 2, 3, 5, 1]),
        [1, 4],
        weighting=weighting,
        reference=reference,
    )
    inputs = torch.randn(20, 6)
    torch.testing.assert_close(run(merged[0], inputs), run(originals[1], inputs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(merged[1], inputs), run(originals[0], inputs), atol=1e-5, rtol=1e-5)


def test_unaligned_shuffled_copies_do_not_merge_without_loss():
    original, inputs = make_expert(), torch.randn(20, 6)
    experts = [original, permute_expert(original, torch.randperm(16))]
    merged = merge_groups(experts, torch.tensor([0, 0]), torch.ones(2), [0], align=False)
    assert (run(merged[0], inputs) - run(original, inputs)).abs().max() > 0.1
    torch.testing.assert_close(merged[0].up, (experts[0].up + experts[1].up) / 2)


def test_the_reference_gives_the_order_of_neurons():
    original = make_expert()
    experts = [permute_expert(original, torch.randperm(16)) for _ in range(4)]
    options = {
        "group_of_E": torch.tensor([0, 1, 1, 1]),
        "counts_E": torch.tensor([9, 3, 2, 2]),
        "dominant": [0, 1],
    }
    assert_experts_close(merge_groups(experts, **options)[1], experts[1])
    assert_experts_close(merge_groups(experts, reference="first", **options)[1], experts[0])


def test_unused_experts_leave_the_group_as_it_is():
    experts = [make_expert() for _ in range(3)]
    for reference in ("dominant", "first"):
        merged = merge_groups(
            experts, torch.tensor([0, 0, 0]), torch.tensor([0, 4, 0]), [1], reference=reference
        )
        assert_bitwise(merged[0], experts[1])


def test_groups_equal_a_loop_over_matrices():
    experts = [make_expert() for _ in range(5)]
    groups, counts, dominant = [0, 1, 0, 1, 1], [2, 5, 3, 1, 0], [2, 1]
    merged = merge_groups(experts, torch.tensor(groups), torch.tensor(counts), dominant)
    for label, leader in enumerate(dominant):
        members = [e for e in range(5) if groups[e] == label]
        total = sum(counts[e] for e in members)
        expected = torch.zeros(16, 6)
        for member in members:
            order = align_expert(experts[member], experts[leader]).permutation
            expected += counts[member] / total * experts[member].up[order]
        torch.testing.assert_close(merged[label].up, expected)


def test_given_alignments_replace_weight_matching():
    original = make_expert()
    shuffles = [torch.randperm(16) for _ in range(3)]
    flips = [torch.where(torch.rand(16) < 0.5, -1.0, 1.0) for _ in range(3)]
    experts = [permute_expert(original, order, signs) for order, signs in zip(shuffles, flips, strict=True)]
    back = [
        Alignment(order.argsort(), signs[order.argsort()])
        for order, signs in zip(shuffles, flips, strict=True)
    ]
    merged = merge_groups(experts, torch.zeros(3, dtype=torch.long), torch.ones(3), [0], alignments=back)
    assert_experts_close(merged[0], original)
    with pytest.raises(ValueError, match="got 2 alignments for 3 experts"):
        merge_groups(experts, torch.zeros(3, dtype=torch.long), torch.ones(3), [0], alignments=back[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dominant": [0, 2]}, "dominant expert 2 is not in group 1"),
        ({"dominant": [0]}, "expert 1 is in group 1, which is not between 0 and 0"),
        ({"dominant": [0, 1, 2]}, "group 2 of 3 is empty"),
        ({"group_of_E": torch.tensor([0, 3, 0])}, "group 1 of 4 is empty"),
        ({"group_of_E": torch.tensor([0, -1, 0])}, "expert 1 is in group -1"),
        ({"counts_E": torch.tensor([1, -2, 1])}, "negative"),
        ({"counts_E": torch.tensor([1.0, float("nan"), 1.0])}, "NaN"),
        ({"weighting": "fisher"}, "weighting='fisher' is not one of frequency, equal"),
        ({"reference": "last"}, "reference='last' is not one of dominant, first"),
        ({"experts": [scalar_expert(1.0)] * 2}, "got 2 experts but groups for 3"),
    ],
)
def test_impossible_groups_are_refused(changes, message):
    arguments = {
        "experts": [scalar_expert(1.0)] * 3,
        "group_of_E": torch.tensor([0, 1, 0]),
        "counts_E": torch.tensor([1, 1, 1]),
        "dominant": [0, 1],
    }
    with pytest.raises(ValueError, match=message):
        merge_groups(**(arguments | changes))
