"""SwiGLU times a weight, against autograd's own products."""

import pytest
import torch
from moekit.moe.dropout.swiglu import weighted_swiglu


def plain(gate_up, weights):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * weights


@pytest.mark.parametrize("shape", [(7, 10), (4, 3, 6)])
def test_values_and_gradients_are_autograds(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    factors = torch.randn(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    factors.view(-1)[0] = 0  # an expert that was not chosen
    found = []
    for function in (weighted_swiglu, plain):
        inputs = values.clone().requires_grad_(), factors.clone().requires_grad_()
        out = function(*inputs)
        out.pow(3).sum().backward()
        found.append([out, *(tensor.grad for tensor in inputs)])
    for ours, autograds in zip(*found, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-14)


def test_the_inputs_stay_as_they_are():
    values, factors = torch.randn(3, 8), torch.randn(3, 1)
    before = values.clone(), factors.clone()
    with torch.no_grad():
        weighted_swiglu(values, factors)
    assert torch.equal(values, before[0])
    assert torch.equal(factors, before[1])
