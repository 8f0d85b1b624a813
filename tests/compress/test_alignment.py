"""Alignment: the function of an expert never changes, and shuffled copies are put back exactly."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from moekit.compress.alignment import activation_permutation, align_expert, permute_expert
from moekit.moe.weights import ExpertWeights

KINDS = ["plain", "plain-biased", "gated", "gated-biased"]


def make_expert(kind, width=24, hidden=10, dtype=torch.float32):
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    if "gated" in kind:
        shapes["gate"] = (width, hidden)
    if "biased" in kind:
        shapes |= {"up_bias": (width,), "down_bias": (hidden,)}
        if "gated" in kind:
            shapes["gate_bias"] = (width,)
    return ExpertWeights(**{name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()})


def run(expert, inputs):
    up = F.linear(inputs, expert.up, expert.up_bias)
    if expert.gate is None:
        hidden = F.gelu(up)
    else:
        hidden = F.silu(F.linear(inputs, expert.gate, expert.gate_bias)) * up
    return F.linear(hidden, expert.down, expert.down_bias)


def noisy(expert, scale):
    return ExpertWeights(**{n: t + scale * torch.randn_like(t) for n, t in expert.named_tensors()})


def assert_same(expert, other):
    mine, theirs = dict(expert.named_tensors()), dict(other.named_tensors())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_alignment_preserves_the_function(kind, dtype, tolerance):
    expert, reference = make_expert(kind, dtype=dtype), make_expert(kind, dtype=dtype)
    inputs = torch.randn(32, 10, dtype=dtype)
    aligned = permute_expert(expert, *align_expert(expert, reference))
    expected = run(expert, inputs)
    error = (run(aligned, inputs) - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    assert not torch.equal(aligned.up, expert.up)


@pytest.mark.parametrize("include_down", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shuffled_copy_is_put_back_exactly(kind, include_down, dtype):
    reference = make_expert(kind, dtype=dtype)
    shuffled = permute_expert(reference, torch.randperm(24))
    assert not torch.equal(shuffled.up, reference.up)
    aligned = permute_expert(shuffled, *align_expert(shuffled, reference, include_down=include_down))
    assert_same(aligned, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_noisy_shuffled_copy_is_put_back(kind):
    reference, shuffle = make_expert(kind), torch.randperm(24)
    shuffled = permute_expert(noisy(reference, 0.1), shuffle)
    permutation, signs = align_expert(shuffled, reference)
    assert torch.equal(shuffle[permutation], torch.arange(24))
    assert signs is None


def test_biases_alone_can_decide():
    same = torch.ones(3, 2)
    reference = ExpertWeights(up=same, down=same.T, up_bias=torch.tensor([1.0, 2.0, 3.0]))
    shuffled = ExpertWeights(up=same, down=same.T, up_bias=torch.tensor([3.0, 1.0, 2.0]))
    assert align_expert(shuffled, reference).permutation.tolist() == [1, 2, 0]


def test_the_down_projection_alone_can_decide():
    same, down = torch.ones(3, 2), torch.randn(2, 3)
    reference = ExpertWeights(up=same, down=down)
    shuffled = ExpertWeights(up=same, down=down[:, [2, 0, 1]])
    assert align_expert(shuffled, reference).permutation.tolist() == [1, 2, 0]
    assert align_expert(shuffled, reference, include_down=False).permutation.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_match_is_the_best_of_all_permutations(kind):
    expert, reference = (make_expert(kind, width=5, hidden=3, dtype=torch.float64) for _ in range(2))

    def agreement(order):
        permuted = dict(permute_expert(expert, torch.tensor(order)).named_tensors())
        return sum((t * permuted[n]).sum() for n, t in reference.named_tensors() if n != "down_bias")

    best = max(permutations(range(5)), key=agreement)
    assert align_expert(expert, reference).permutation.tolist() == list(best)


@pytest.mark.parametrize("kind", ["gated", "gated-biased"])
def test_signs_are_found_and_cancel(kind):
    reference = make_expert(kind)
    flips = torch.where(torch.rand(24) < 0.5, -1.0, 1.0)
    flipped = permute_expert(noisy(reference, 0.01), torch.randperm(24), flips)
    alignment = align_expert(flipped, reference, match_signs=True)
    aligned = permute_expert(flipped, *alignment)
    assert alignment.signs is not None
    assert sorted(alignment.signs.tolist()) == sorted(flips.tolist())
    for name, tensor in aligned.named_tensors():
        torch.testing.assert_close(tensor, getattr(reference, name), atol=0.1, rtol=0)
    inputs = torch.randn(16, 10)
    torch.testing.assert_close(run(aligned, inputs), run(flipped, inputs), atol=1e-4, rtol=1e-5)


def test_without_flips_matching_signs_changes_nothing():
    reference = make_expert("gated")
    shuffled = permute_expert(reference, torch.randperm(24))
    permutation, signs = align_expert(shuffled, reference, match_signs=True)
    assert_same(permute_expert(shuffled, permutation, signs), reference)


def test_signs_need_a_gate():
    plain = make_expert("plain")
    with pytest.raises(ValueError, match="match_signs=True needs gated experts"):
        align_expert(plain, plain, match_signs=True)
    with pytest.raises(ValueError, match="signs need gated experts"):
        permute_expert(plain, torch.arange(24), torch.ones(24))


def test_alignment_is_deterministic_under_ties_and_of_an_expert_with_itself_trivial():
    expert = make_expert("gated")
    assert align_expert(expert, expert).permutation.tolist() == list(range(24))
    twins = ExpertWeights(up=torch.ones(6, 3), down=torch.ones(3, 6))
    first = align_expert(twins, twins).permutation
    assert torch.equal(first, align_expert(twins, twins).permutation)
    assert_same(permute_expert(twins, first), twins)


def test_parameters_are_read_without_gradient_and_left_alone():
    expert = ExpertWeights(**{n: torch.nn.Parameter(t) for n, t in make_expert("gated").named_tensors()})
    before = expert.up.detach().clone()
    aligned = permute_expert(expert, torch.randperm(24))
    assert not aligned.up.requires_grad
    aligned.up.zero_()
    assert torch.equal(expert.up, before)


@pytest.mark.parametrize("other", ["plain", "gated-biased"])
def test_other_layouts_are_refused(other):
    with pytest.raises(ValueError, match="the expert and its reference have different layouts"):
        align_expert(make_expert(other), make_expert("gated"))
    with pytest.raises(ValueError, match="different layouts"):
        align_expert(make_expert("gated", width=12), make_expert("gated"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_refused(bad):
    expert = make_expert("gated")
    expert.down[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        align_expert(expert, make_expert("gated"))


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1], [1, 2, 3], [0, 1, 2, 3]])
def test_no_permutation_is_refused(order):
    expert = ExpertWeights(up=torch.ones(3, 2), down=torch.ones(2, 3))
    with pytest.raises(ValueError, match="each of the 3 neurons once"):
        permute_expert(expert, torch.tensor(order))


def test_activations_put_a_shuffled_copy_back():
    hidden_TF, shuffle = torch.randn(100, 12), torch.randperm(12)
    scales_F = torch.rand(12) + 0.5
    shuffled_TF = hidden_TF[:, shuffle] * scales_F + 3.0
    permutation = activation_permutation(hidden_TF, shuffled_TF)
    assert torch.equal(shuffle[permutation], torch.arange(12))


def test_activation_matching_equals_the_correlation_matrix():
    scales_F = torch.tensor([1.0, 100.0, 0.01, 10.0], dtype=torch.float64)
    reference_TF = torch.randn(30, 4, dtype=torch.float64) * scales_F
    hidden_TF = torch.randn(30, 4, dtype=torch.float64) * scales_F.flip(0)
    score_FF = torch.corrcoef(torch.cat([reference_TF, hidden_TF], dim=1).T)[:4, 4:]
    best = max(permutations(range(4)), key=lambda order: sum(score_FF[i, j] for i, j in enumerate(order)))
    assert activation_permutation(reference_TF, hidden_TF).tolist() == list(best)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_too_few_tokens_leave_the_order(num_tokens):
    hidden_TF = torch.randn(num_tokens, 5)
    assert activation_permutation(hidden_TF, hidden_TF.flip(1)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("constants", list(permutations([0.1, 0.3, 0.7, 0.9], 2)))
def test_constant_units_do_not_disturb_the_others(constants):
    # The float32 mean of equal numbers is a little off: two constant columns centred by it would correlate
    # by +1 or -1, and -1 would outweigh the true but weak match of the others.
    signal_T, noise_T = torch.randn(1000), torch.randn(1000)
    reference_TF = torch.stack([torch.full((1000,), constants[0]), signal_T], dim=1)
    hidden_TF = torch.stack([signal_T + noise_T, torch.full((1000,), constants[1])], dim=1)
    assert activation_permutation(reference_TF, hidden_TF).tolist() == [1, 0]


def test_broken_activations_are_refused():
    hidden_TF = torch.randn(8, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        activation_permutation(hidden_TF, hidden_TF.index_fill(1, torch.tensor([1]), float("nan")))
