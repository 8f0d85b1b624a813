import pytest
import torch

from .layers import EXPERTS, random_hidden, random_layer, random_router


@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_softmax_over_the_chosen_is_softmax_over_all_renormalised(k):
    router = random_router()
    router.top_k = k
    logits, weights, ids = router(random_hidden())
    probabilities = logits.softmax(-1)
    top, top_ids = probabilities.topk(k)
    expected = torch.zeros_like(logits).scatter(1, top_ids, top / top.sum(-1, keepdim=True))
    torch.testing.assert_close(
        torch.zeros_like(logits).scatter(1, ids, weights), expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("combine", ["softmax", "uniform"])
@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_weights_sum_to_the_scale_at_every_k(combine, k):
    router = random_router(combine, scale=3.0)
    router.top_k = k
    _, weights, ids = router(random_hidden())
    torch.testing.assert_close(weights.sum(-1), torch.full((10,), 3.0, dtype=torch.float64))
    assert all(len(set(row)) == k for row in ids.tolist())


def test_residual_weights_are_one_until_the_gain_is_learned():
    router = random_router("residual")
    router.top_k = 2
    logits, weights, ids = router(random_hidden())
    assert torch.equal(weights, torch.ones_like(weights))
    assert router.gain is not None
    router.gain.data.fill_(2.0)
    expected = 1 + 2 * logits.softmax(-1).gather(1, ids)
    torch.testing.assert_close(router(random_hidden())[1], expected)


@pytest.mark.parametrize("width", [64, 1024])
def test_the_logits_deviate_as_asked_at_any_width(width):
    router = random_router(num_experts=16, hidden_size=width)
    router.draw(torch.Generator().manual_seed(0), logit_std=0.5)
    hidden = torch.randn(4096, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs(float(router(hidden)[0].std()) - 0.5) < 0.05


def test_the_router_is_a_buffer_and_drawn_from_its_seed_alone():
    one, other = random_router(), random_router()
    assert torch.equal(one.weight, other.weight)
    assert not list(one.parameters())
    assert set(one.state_dict()) == {"weight", "bias"}
    assert one.kind == "random"
    learned = random_router(trainable=True)
    assert {name for name, _ in learned.named_parameters()} == {"weight"}
    assert learned.kind == "learned"
    assert torch.equal(learned.weight, one.weight)


def test_gradients_flow_through_a_frozen_router_but_not_into_it():
    layer = random_layer()
    layer.active_experts = 2
    hidden = random_hidden().requires_grad_()
    _, weights, _ = layer.router(hidden)
    weights[:, 0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert layer.router.weight.grad is None


@pytest.mark.parametrize("k", [0, -1, EXPERTS + 1, True])
def test_a_k_out_of_range_is_refused_and_changes_nothing(k):
    layer = random_layer()
    layer.active_experts = 3
    with pytest.raises(ValueError, match=f"active_experts={k} is not between 1 and {EXPERTS} experts"):
        layer.active_experts = k
    assert layer.active_experts == 3
