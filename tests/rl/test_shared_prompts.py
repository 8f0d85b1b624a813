"""A prompt that is read once for its completions gives what rows of their own give."""

import pytest
import torch
from moekit.rl import Prompt, Rollout, RolloutGroup, policy_batch
from moekit.rl.expert_metrics import ExpertMeter
from moekit.rl.policy import Policy, policy_inputs, statistics_of
from moekit.rl.shared_prompts import shared_arrangement
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from .policies import VOCABULARY, compressed, tiny_model
from .tiny_rl import assert_same, tiny_trainer, untimed, weights

LONG = {"max_position_embeddings": 64}


def group_batch(prompts=(12, 9), completions=((5, 3, 6, 1), (4, 4, 2))):
    """Completions of those lengths for prompts of those lengths, groups mixed up."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    groups = []
    for index, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        rollouts = tuple(Rollout(completion_ids=tokens(n), text="", is_truncated=False) for n in lengths)
        given = Prompt(index=index, text="", ids=tokens(prompt), given="")
        groups.append(RolloutGroup(prompt=given, rollouts=rollouts, rewards=torch.zeros(len(lengths))))
    batch = policy_batch(groups, pad_id=0)
    return batch.select([4, 0, 2, 5, 1, 6, 3])


def said_with_gradients(model, batch, *, share):
    policy = Policy(model, share_prompts=share)
    assert policy.shares_prompts == share
    now = statistics_of(policy, batch, temperature=0.7, with_entropy_gradient=True, with_mean_vocab=True)
    weights_BL = torch.linspace(-1, 1, batch.token_mask.numel()).view_as(batch.token_mask).to(now.logprobs)
    (
        weights_BL * batch.token_mask * (now.logprobs + now.entropies + now.mean_vocab_logprobs)
    ).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return now, gradients


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "olmoe"])
def test_values_and_gradients_are_those_of_rows_of_their_own(name):
    model = tiny_model(name, **LONG)
    model.set_experts_implementation("eager")
    model.double()
    batch = group_batch()
    assert len(Policy(model).arrange(**policy_inputs(batch)).input_ids) == 2
    plain, plain_gradients = said_with_gradients(model, batch, share=False)
    shared, shared_gradients = said_with_gradients(model, batch, share=True)
    for value in ("logprobs", "entropies", "mean_vocab_logprobs"):
        torch.testing.assert_close(getattr(shared, value), getattr(plain, value), rtol=1e-5, atol=1e-5)
    assert_same(shared_gradients, plain_gradients, tolerance=1e-4)  # norms are in single precision


def test_experts_are_counted_as_in_rows_of_their_own():
    batch = group_batch()
    sums = []
    for share in (True, False):
        policy = Policy(compressed("qwen3_moe"), share_prompts=share)
        meter = ExpertMeter(policy.layers)
        counted = policy.arrange(**policy_inputs(batch)).weights
        with torch.no_grad(), meter.listen(counted):
            statistics_of(policy, batch, temperature=1.0)
        sums.append(meter.sums)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=0)
    assert sums[0][0, -1] == 12 * 4 + 9 * 3 + int(batch.token_mask.sum())


def test_nothing_is_shared_where_it_would_cost_more():
    batch = group_batch(prompts=(2, 3), completions=((9, 9), (9, 9, 9, 9, 9)))
    assert shared_arrangement(*policy_inputs(batch).values()) is None
    alone = group_batch(prompts=(12, 9), completions=((5,), (4, 4, 2, 2, 2, 2))).select([0, 1])
    assert shared_arrangement(*policy_inputs(alone).values()) is None


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "build",
    [
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4096)),
        lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
        ),
        lambda: tiny_model("gpt2"),
    ],
    ids=["sliding window", "gpt-oss", "recurrent", "eager attention"],
)
def test_models_that_cannot_share_read_rows_of_their_own(build, request):
    torch.manual_seed(0)
    model = build()
    if "eager" in request.node.name:
        model.set_attn_implementation("eager")
    policy = Policy(model)
    assert not policy.shares_prompts
    batch = group_batch()
    now = statistics_of(policy, batch, temperature=1.0)
    assert torch.equal(
        now.logprobs, statistics_of(Policy(model, share_prompts=False), batch, temperature=1.0).logprobs
    )


@pytest.mark.parametrize("settings", [{}, {"mini_batches": 2, "num_iterations": 2}])
def test_a_training_is_the_same_but_for_rounding(tmp_path, monkeypatch, settings):
    """Completions of two tokens behind prompts of three words."""
    given = {"max_completion_length": 2, "num_generations": 6, "prompts_per_step": 2, **settings}
    sharing = tiny_trainer(tmp_path / "shared", **given)
    assert sharing.learner.passes.plain.shares_prompts
    sharing.train()
    monkeypatch.setattr("moekit.rl.policy.can_share_prompts", lambda *_: False)
    plain = tiny_trainer(tmp_path / "plain", **given)
    plain.train()
    assert_same(weights(sharing), weights(plain), tolerance=1e-4)
    for one, other in zip(untimed(sharing.history.read()), untimed(plain.history.read()), strict=True):
        assert one.keys() == other.keys()
        assert one["reward"] == other["reward"]
        assert one.get("entropy") == pytest.approx(other.get("entropy"), abs=1e-4)
