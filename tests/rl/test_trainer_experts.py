"""The reference, router replay and expert metrics in the trainer."""

import math

import pytest
import torch
from moekit.moe import expert_layers
from moekit.moe.router_replay import record_choices

from .tiny_rl import assert_same, tiny_policy, tiny_trainer


def compressed():
    """Four experts behind two."""
    model = tiny_policy()
    for layer in expert_layers(model):
        first, second, *_ = layer.experts()
        layer.replace_experts([first, second], [0, 1, 1, 0])
    return model


@pytest.mark.parametrize("make", [tiny_policy, compressed])
def test_the_reference_is_the_policy_as_it_was(tmp_path, make):
    trainer = tiny_trainer(tmp_path, model=make(), beta=0.1, steps=2)
    trainer.train()
    first, second = trainer.history.read()
    assert first["kl"] == 0
    assert second["kl"] > 0
    reference = trainer.learner.passes.reference.policy.plain
    assert_same(dict(reference.named_parameters()), {n: p.detach() for n, p in make().named_parameters()})
    sizes = [layer.num_physical_experts for layer in expert_layers(reference)]
    assert sizes == [layer.num_physical_experts for layer in expert_layers(make())]


def test_no_divergence_is_shown_without_a_reference(tmp_path):
    for name in ("grpo", "dph-rl"):  # whose rehearsal samples have log-probs of their own
        trainer = tiny_trainer(tmp_path / name, name, steps=1)
        trainer.train()
        assert "kl" not in trainer.history.read()[0]


def test_replayed_are_the_routes_of_the_old_pass(tmp_path):
    trainer = tiny_trainer(
        tmp_path, router_replay=True, num_iterations=2, steps=1, micro_batch_size=16, learning_rate=0.3
    )
    passes, seen = trainer.learner.passes, []
    layers, ratios = passes.plain.layers, []
    compute, loss = passes.now, trainer.learner.updater.objective.loss

    def watched(micro):
        ids = {}
        with layers[0].observe(lambda hidden, ids_TK, weights: ids.update(first=ids_TK.clone())):
            found = compute(micro)
        mask = torch.cat([micro.prompt_mask, micro.token_mask], 1).flatten()
        seen.append(ids["first"][mask])
        return found

    def noted(now, micro, *rest):
        ratios.append((now.logprobs - micro.old_logprobs)[micro.policy_mask].exp().detach())
        return loss(now, micro, *rest)

    passes.now = watched
    trainer.learner.updater.objective.loss = noted
    trainer.train()
    (recorded,) = passes.routes.values()
    assert len(seen) == 2
    for ids in seen:
        assert ids.equal(recorded.choices[layers[0].name].long())
    assert (ratios[0] == 1).all()
    assert (ratios[1] != 1).any()


def test_live_routers_have_moved_where_replayed_ones_have_not(tmp_path):
    trainer = tiny_trainer(tmp_path, num_iterations=2, steps=1, micro_batch_size=16, learning_rate=0.3)
    model = trainer.learner.passes.plain.plain
    ids = torch.arange(3, 15)[None]

    def routes():
        with torch.no_grad(), record_choices(model) as found:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return found.choices

    before = routes()
    trainer.train()
    after = routes()
    assert any((before[name] != after[name]).any() for name in before)


@pytest.mark.parametrize("name", ["grpo", "gtpo"])
def test_experts_are_measured_once_a_step(tmp_path, name):
    """In the pass before the updates, or in the only update; the reference's passes do not count."""
    trainer = tiny_trainer(tmp_path, name, steps=1, beta=0.1)
    batch = trainer.rollouts.batch(trainer.rollouts.sample(trainer.state), trainer.state)
    trainer.state.position = 0
    passes, counted = trainer.learner.passes, []
    take = passes.take_expert_metrics

    def watched():
        counted.append(passes._meter.sums[:, -1].tolist())
        return take()

    passes.take_expert_metrics = watched
    trainer.train()
    tokens = float(batch.prompt_mask.sum() + batch.token_mask.sum())
    assert counted == [[tokens, tokens]], "of each layer"
    assert passes._meter is None
    (row,) = trainer.history.read()
    assert 0 < row["router_entropy"] <= math.log(4) + 1e-6
    assert 1 <= row["expert_load_max"] <= 4
    assert 0 <= row["expert_dead_share"] < 1


def test_a_dense_policy_has_no_experts_to_measure(tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_policy(mlp_only_layers=[0, 1]), steps=1)
    trainer.train()
    assert "router_entropy" not in trainer.history.read()[0]
