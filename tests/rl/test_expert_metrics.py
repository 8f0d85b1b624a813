"""Load and entropy of a policy's experts, counted while it runs."""

import pytest
import torch
from moekit.moe import record_routing
from moekit.rl.expert_metrics import ExpertMeter
from moekit.rl.policy import Policy, policy_inputs, statistics_of

from .policies import compressed, tiny_batch, tiny_model


def heard(policy, batches):
    meter = ExpertMeter(policy.layers)
    for batch in batches:
        with torch.no_grad(), meter.listen(policy_inputs(batch)["attention_mask"]):
            statistics_of(policy, batch, temperature=1.0)
    return meter


@pytest.mark.parametrize("build", [lambda: tiny_model("olmoe"), lambda: compressed("qwen3_moe")])
def test_equal_to_recorded_statistics(build):
    policy = Policy(build())
    batch = tiny_batch()
    meter = heard(policy, [batch])
    with record_routing(policy.plain) as statistics, torch.no_grad():
        statistics_of(policy, batch, temperature=1.0)
    layers = [statistics.layers[layer.name] for layer in policy.layers]
    num_tokens = int(policy_inputs(batch)["attention_mask"].sum())
    for sums, layer in zip(meter.sums, layers, strict=True):
        assert sums[:8].tolist() == layer.counts.tolist()
        assert sums[-1] == num_tokens
    metrics = meter.metrics()
    entropies = [layer.router_entropy_sum / num_tokens for layer in layers]
    assert metrics["router_entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-5)
    loads = [float(layer.counts.max() / layer.counts.double().mean()) for layer in layers]
    assert metrics["expert_load_max"] == pytest.approx(sum(loads) / 2)
    dead = [float((layer.counts == 0).double().mean()) for layer in layers]
    assert metrics["expert_dead_share"] == pytest.approx(sum(dead) / 2)


def test_parts_and_processes_add_up():
    policy = Policy(tiny_model("mixtral"))
    batch = tiny_batch()
    whole = heard(policy, [batch])
    cut = heard(policy, [batch.select([0, 3]), batch.select([1]), batch.select([2])])
    torch.testing.assert_close(cut.sums, whole.sums, rtol=1e-5, atol=1e-5)
    one, other = heard(policy, [batch.select([0, 1])]), heard(policy, [batch.select([2, 3])])
    one.sums += other.sums
    assert one.metrics() == pytest.approx(whole.metrics(), rel=1e-5)


def test_a_router_of_one_mind_has_dead_experts_and_little_entropy():
    model = tiny_model("olmoe")
    policy = Policy(model)
    with torch.no_grad():
        for layer in policy.layers:
            layer.router.weight.zero_()
    metrics = heard(policy, [tiny_batch()]).metrics()
    # Equal logits: the first two of eight experts have it all.
    assert metrics["router_entropy"] == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-5)
    assert metrics["expert_load_max"] == pytest.approx(4.0)
    assert metrics["expert_dead_share"] == pytest.approx(0.75)


def test_nothing_counted_gives_nothing_and_nothing_stays_behind():
    policy = Policy(tiny_model("olmoe"))
    meter = ExpertMeter(policy.layers)
    assert meter.metrics() == {}
    with meter.listen(torch.ones(1, 2)):
        pass
    assert not any(layer.router._forward_hooks for layer in policy.layers)


def test_layers_of_different_sizes():
    model = tiny_model("qwen3_moe")
    policy = Policy(model)
    policy.layers[1].remove_experts([0, 2, 5])
    policy = Policy(model)
    meter = heard(policy, [tiny_batch()])
    assert meter.sums.shape == (2, 10)
    assert not meter.sums[1, 3:8].any()
    assert meter.metrics()["expert_load_max"] >= 1
