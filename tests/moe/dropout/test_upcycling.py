"""Drop-Upcycling: what stays is the dense FFN to the bit, what is drawn anew has its statistics."""

# D hidden (model) width, F FFN width

import math

import pytest
import torch
from moekit.moe.dropout.upcycling import drop_upcycle
from moekit.moe.weights import ExpertWeights

KINDS = ["plain", "plain-biased", "gated", "gated-biased"]


def make_ffn(kind, width=40, hidden=12, dtype=torch.float32):
    """Matrices of different means and deviations."""
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    if "gated" in kind:
        shapes["gate"] = (width, hidden)
    if "biased" in kind:
        shapes |= {"up_bias": (width,), "down_bias": (hidden,)}
        if "gated" in kind:
            shapes["gate_bias"] = (width,)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.5 * index + (1 + index) * torch.randn(shape, generator=generator)
        for index, (name, shape) in enumerate(shapes.items())
    }
    return ExpertWeights(**{name: tensor.to(dtype) for name, tensor in tensors.items()})


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def by_neuron(weights):
    """The tensors that belong to neurons, one row each."""
    return {
        name: tensor.T if name == "down" else tensor
        for name, tensor in weights.named_tensors()
        if name != "down_bias"
    }


def changed_neurons(before, after):
    """For each tensor, which neurons have any new number."""
    old, new = by_neuron(before), by_neuron(after)
    return {name: (old[name] != new[name]).reshape(len(old[name]), -1).any(1) for name in old}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_dropped_is_an_exact_copy(kind, dtype):
    dense = make_ffn(kind, dtype=dtype)
    copy = dict(drop_upcycle(dense, 0.0, generator()).named_tensors())
    assert copy.keys() == dict(dense.named_tensors()).keys()
    for name, tensor in dense.named_tensors():
        assert torch.equal(copy[name], tensor)
        assert copy[name].dtype == dtype
        assert copy[name].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.5, 1.0])
def test_the_same_neurons_change_in_every_matrix(kind, fraction):
    dense, untouched = make_ffn(kind), make_ffn(kind)
    expert = drop_upcycle(dense, fraction, generator())
    changed = changed_neurons(dense, expert)
    first = changed.pop("up")
    assert first.sum() == round(fraction * 40)
    assert all(torch.equal(first, other) for other in changed.values())
    # A neuron that changed has changed as a whole.
    assert (by_neuron(dense)["down"][first] != by_neuron(expert)["down"][first]).all()
    for name, tensor in dense.named_tensors():
        assert torch.equal(tensor, getattr(untouched, name))
    if dense.down_bias is not None:
        assert torch.equal(expert.down_bias, dense.down_bias)


@pytest.mark.parametrize("kind", ["plain-biased", "gated-biased"])
def test_new_numbers_have_the_statistics_of_those_they_replace(kind):
    dense = make_ffn(kind, width=2000, hidden=60)
    # Neurons that stay would spoil the statistics, were they in them.
    dropped = torch.randperm(2000, generator=generator())[:1000]
    stays = torch.ones(2000, dtype=torch.bool)
    stays[dropped] = False
    for rows in by_neuron(dense).values():
        rows[stays] = 100.0

    expert = drop_upcycle(dense, 0.5, generator())

    for name, new in by_neuron(expert).items():
        old = by_neuron(dense)[name][dropped]
        error = 5 * float(old.std()) / math.sqrt(old.numel())
        assert float(new[dropped].mean()) == pytest.approx(float(old.mean()), abs=error)
        assert float(new[dropped].std()) == pytest.approx(float(old.std()), abs=error)
        assert (new[stays] == 100).all()


def test_equal_numbers_are_drawn_again():
    dense = ExpertWeights(up=torch.full((8, 3), 0.25), down=torch.full((3, 8), -2.0), up_bias=torch.ones(8))
    expert = drop_upcycle(dense, 0.125, generator())  # one neuron, so one number of the bias
    for name, tensor in dense.named_tensors():
        assert torch.equal(getattr(expert, name), tensor)


def test_experts_differ_and_a_seed_repeats_them():
    dense, source = make_ffn("gated"), generator()
    first, second = (drop_upcycle(dense, 0.5, source) for _ in range(2))
    assert not torch.equal(changed_neurons(dense, first)["up"], changed_neurons(dense, second)["up"])
    again = drop_upcycle(dense, 0.5, generator())
    assert all(torch.equal(getattr(again, name), tensor) for name, tensor in first.named_tensors())


def test_the_draw_does_not_depend_on_the_dtype():
    single, half = (make_ffn("gated", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    expected, actual = (drop_upcycle(dense, 0.5, generator()) for dense in (single, half))
    for name, tensor in actual.named_tensors():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), getattr(expected, name), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction={fraction} is not between 0 and 1"):
        drop_upcycle(make_ffn("gated"), fraction, generator())
