import subprocess
import sys

import pytest
import torch
from moekit.moe.dropout.experts import break_even_share
from torch.utils.checkpoint import checkpoint

from .layers import EXPERTS, WIDTH, expert_slice, ffn_output, random_ffn, random_hidden, sliced_experts

KINDS = [{"gated": g, "biased": b} for g in (False, True) for b in (False, True)]


def random_choices(num_tokens: int, k: int):
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(num_tokens)])
    return ids, torch.rand(num_tokens, k, generator=generator, dtype=torch.float64)


def loop_reference(weights, hidden, ids, routing):
    width = WIDTH // EXPERTS
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, weight in zip(ids[token].tolist(), routing[token].tolist(), strict=True):
            part = expert_slice(weights, slice(expert * width, (expert + 1) * width))
            out[token] += weight * ffn_output(part, hidden[token : token + 1])[0]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_both_ways_sum_the_weighted_experts(kind, k, way):
    weights = random_ffn(**kind)
    hidden = random_hidden()
    ids, routing = random_choices(len(hidden), k)
    experts = sliced_experts(weights)
    computed = getattr(experts, way)(hidden, ids, routing)
    torch.testing.assert_close(
        computed, loop_reference(weights, hidden, ids, routing), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("hidden_size", "width"), [(16, 32), (12, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_of_torch_agrees_with_the_dense_way(dtype, hidden_size, width):
    """The second sizes are not aligned as that product demands in bfloat16."""
    hidden = torch.randn(64, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, routing = random_choices(len(hidden), 2)
    experts = sliced_experts(random_ffn(biased=True, dtype=dtype, hidden_size=hidden_size, width=width))
    choices = hidden, ids, routing.to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(
        experts.grouped(*choices), experts.dense(*choices), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_all_experts_of_equal_weight_are_the_ffn(way):
    weights = random_ffn(biased=True)
    hidden = random_hidden()
    ids = torch.arange(EXPERTS).expand(len(hidden), -1)
    routing = torch.ones(len(hidden), EXPERTS, dtype=torch.float64)
    computed = getattr(sliced_experts(weights), way)(hidden, ids, routing)
    torch.testing.assert_close(computed, ffn_output(weights, hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_have_the_same_gradients(kind):
    hidden = random_hidden()
    ids, routing = random_choices(len(hidden), 2)
    gradients = []
    for way in ("grouped", "dense"):
        experts = sliced_experts(random_ffn(**kind))
        x, w = hidden.clone().requires_grad_(), routing.clone().requires_grad_()
        getattr(experts, way)(x, ids, w).square().sum().backward()
        gradients.append([x.grad, w.grad, *(p.grad for p in experts.parameters())])
    for grouped, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(grouped, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_autocast_reaches_both_ways(biased):
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    experts = sliced_experts(random_ffn(dtype=torch.float32, biased=biased, hidden_size=16, width=32))
    choices = hidden, *random_choices(len(hidden), 2)
    choices = (*choices[:2], choices[2].float())
    with torch.autocast("cpu", torch.bfloat16):
        grouped, dense = experts.grouped(*choices), experts.dense(*choices)
    assert grouped.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(grouped, dense, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_the_dense_way_are_those_of_differences(kind):
    experts = sliced_experts(random_ffn(**kind))
    hidden = random_hidden(3).requires_grad_()
    ids, routing = random_choices(len(hidden), 2)

    def run(hidden, routing, *parameters):
        return experts.dense(hidden, ids, routing)

    assert torch.autograd.gradcheck(run, (hidden, routing.requires_grad_(), *experts.parameters()))


@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_inference_computes_what_training_does(way):
    hidden = random_hidden()
    ids, routing = random_choices(len(hidden), 2)
    run = getattr(sliced_experts(random_ffn()), way)
    trained = run(hidden, ids, routing)
    with torch.inference_mode():
        assert torch.equal(run(hidden, ids, routing), trained)


@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_second_derivatives_of_gated_experts_are_refused(way):
    hidden = random_hidden().requires_grad_()
    ids, routing = random_choices(len(hidden), 2)
    out = getattr(sliced_experts(random_ffn()), way)(hidden, ids, routing)
    (gradient,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_gradient_checkpointing_changes_no_gradient(way):
    ids, routing = random_choices(10, 2)
    gradients = []
    for repeats in (False, True):
        experts = sliced_experts(random_ffn(biased=True))
        x, run = random_hidden().requires_grad_(), getattr(experts, way)
        out = checkpoint(run, x, ids, routing, use_reentrant=False) if repeats else run(x, ids, routing)
        out.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in experts.parameters())])
    for kept, repeated in zip(*gradients, strict=True):
        assert torch.equal(kept, repeated)


COMPILED = """
import torch
from moekit.moe.dropout.experts import SlicedExperts

torch.manual_seed(0)
sizes = {"has_gate": True, "has_bias": True, "like": torch.empty(0)}
experts = SlicedExperts(4, 8, 16, torch.nn.SiLU(), **sizes)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
hidden = torch.randn(8, 16, requires_grad=True)
for k in (1, 4):
    ids, weights = torch.rand(8, 4).topk(k).indices, torch.rand(8, k)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    outs = [run(hidden, ids, weights) for run in (experts, compiled)]
    gradients = [torch.autograd.grad(out.square().sum(), hidden)[0] for out in outs]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_compiled_experts_are_one_graph_and_compute_the_same():
    """In a process of its own, since the compiler cannot read the checks of shapes that tests add."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


def test_an_expert_chosen_twice_counts_twice():
    """As happens once a merged layer's map sends two logical experts to one."""
    hidden = random_hidden()
    experts = sliced_experts(random_ffn())
    once = torch.full((len(hidden), 1), 3)
    weight = torch.ones(len(hidden), 1, dtype=torch.float64)
    for way in (experts.grouped, experts.dense):
        twice = way(hidden, once.expand(-1, 2), (weight / 2).expand(-1, 2))
        torch.testing.assert_close(twice, way(hidden, once, weight))


def test_an_expert_without_tokens_has_gradient_zero():
    experts = sliced_experts(random_ffn(dtype=torch.float32, hidden_size=16, width=32))
    hidden = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(len(hidden), 1, dtype=torch.long)
    experts.grouped(hidden, ids, torch.ones(len(hidden), 1)).square().sum().backward()
    gradient = experts.down_proj.grad
    assert gradient is not None
    assert gradient[0].abs().sum() > 0
    assert not gradient[1:].any()


def test_expert_views_write_to_the_parameters():
    experts = sliced_experts(random_ffn(biased=True))
    for tensor in dict(experts.expert(2).named_tensors()).values():
        tensor.zero_()
    assert not experts.gate_up_proj[2].any()
    assert not experts.gate_up_bias[2].any()
    assert not experts.down_proj[2].any()
    assert experts.down_proj[1].any()


def test_the_way_is_chosen_by_the_share_of_active_experts():
    experts = sliced_experts(random_ffn())
    hidden = random_hidden()
    assert experts.computes_densely(EXPERTS, hidden)
    assert not experts.computes_densely(1, hidden)
    assert experts.computes_densely(1, hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.computes_densely(1, hidden)
    experts.break_even = 0.0
    assert experts.computes_densely(1, hidden)


def test_larger_experts_are_sorted_for_longer():
    cpu, kind = torch.device("cpu"), torch.float32
    assert break_even_share(2**18, cpu, kind) > break_even_share(2**12, cpu, kind) > 0
    assert break_even_share(2**40, cpu, kind) < 1


@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_no_tokens_give_no_outputs(way):
    experts = sliced_experts(random_ffn())
    hidden = random_hidden()[:0]
    ids, routing = random_choices(1, 2)
    out = getattr(experts, way)(hidden, ids[:0], routing[:0])
    assert out.shape == hidden.shape
