import copy

import pytest
import torch
from moekit.moe.dropout.build import smoe_layers
from moekit.moe.dropout.thor import ThorRouter, consistency_loss, thor_loss

from .small_models import smoe, token_ids


def make_router(k=1, seed=0):
    router = ThorRouter(8, scale=2.0, like=torch.empty(1))
    router.draw(torch.Generator().manual_seed(seed))
    router.top_k = k
    return router


@pytest.mark.parametrize("k", [1, 3, 8])
def test_training_draws_experts_once_for_the_whole_batch(k):
    router = make_router(k).train()
    draws = [router(torch.randn(6, 4)) for _ in range(400)]
    for scores, weights, ids in draws[:10]:
        assert torch.equal(ids, ids[:1].expand(6, k))
        assert len(set(ids[0].tolist())) == k
        assert torch.equal(scores.topk(k).indices, ids)
        assert torch.equal(weights, torch.full((6, k), 2.0 / k))
    counts = torch.bincount(torch.cat([ids[0] for _, _, ids in draws]), minlength=8)
    assert counts.min() > 0.5 * 400 * k / 8


def test_training_follows_the_global_generator():
    router = make_router(2).train()
    hidden = torch.randn(3, 4)
    torch.manual_seed(7)
    first = [router(hidden)[2] for _ in range(5)]
    torch.manual_seed(7)
    assert all(torch.equal(router(hidden)[2], ids) for ids in first)


def test_evaluation_draws_for_every_token_and_can_be_repeated():
    router = make_router(2).eval()
    hidden = torch.randn(800, 4)
    state = torch.get_rng_state()
    ids = router(hidden)[2]
    assert torch.equal(router(hidden)[2], ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(make_router(2, seed=1).eval()(hidden)[2], ids)
    counts = torch.bincount(ids.flatten(), minlength=8)
    assert counts.min() > 0.7 * 200
    assert counts.max() < 1.3 * 200


def test_layers_draw_apart():
    seeds = {int(layer.router.seed) for layer in smoe_layers(smoe("thor")).values()}
    assert len(seeds) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_draws(reentrant):
    model = smoe("thor").train()
    ids = token_ids()
    plain, checkpointed = model, copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    for each in (plain, checkpointed):
        each.enable_input_require_grads()
        torch.manual_seed(3)
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def loop_divergence(logits_1, logits_2, counted):
    total = 0.0
    for one, other, counts in zip(logits_1.softmax(-1), logits_2.softmax(-1), counted, strict=True):
        if counts:
            total += (
                sum(float(p * (p / q).log() + q * (q / p).log()) for p, q in zip(one, other, strict=True)) / 2
            )
    return total / int(counted.sum())


def test_the_consistency_is_what_a_loop_computes():
    one, other = torch.randn(2, 9, 5, dtype=torch.float64)
    counted = torch.tensor([True, False, True] * 3)
    computed = consistency_loss(one, other, counted)
    assert float(computed) == pytest.approx(loop_divergence(one, other, counted), rel=1e-12)
    torch.testing.assert_close(consistency_loss(other, one, counted), computed)
    assert float(consistency_loss(one, one, counted)) == 0


def test_the_consistency_is_the_divergence_of_torch():
    one, other = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    kl = torch.nn.functional.kl_div
    logs = one.log_softmax(-1), other.log_softmax(-1)
    both = [kl(a, b, reduction="sum", log_target=True) for a, b in (logs, logs[::-1])]
    counted = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(consistency_loss(one, other, counted), (both[0] + both[1]) / 24)


def test_the_objective_adds_both_entropies_and_alpha_times_the_consistency():
    one, other = torch.randn(2, 6, 5, dtype=torch.float64)
    labels = torch.tensor([1, -100, 4, 0, -100, 2])
    entropies = [torch.nn.functional.cross_entropy(logits, labels) for logits in (one, other)]
    divergence = loop_divergence(one, other, labels != -100)
    expected = float(entropies[0] + entropies[1]) + 0.5 * divergence
    assert float(thor_loss(one, other, labels, alpha=0.5)) == pytest.approx(expected, rel=1e-12)


def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole():
    logits = torch.randn(2, 8, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 4, 0, -100, 2, -100, -100])
    whole = thor_loss(*logits, labels)
    (expected,) = torch.autograd.grad(whole, logits)
    parts = [thor_loss(*logits[:, rows], labels[rows], num_items=4) for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], expected)
