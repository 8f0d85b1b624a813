"""The policy as it was: a copy in memory, or the model without its adapters."""

import pytest
import torch
from moekit.moe import expert_layers
from moekit.rl.policy import Policy, statistics_of
from moekit.rl.reference import Reference
from peft import LoraConfig, get_peft_model

from .policies import compressed, tiny_batch, tiny_model


def adapted_model():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), config)


def learn(policy):
    """A large step on every parameter that learns."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


POLICIES = {
    "compressed": lambda: compressed("qwen3_moe"),
    "dense": lambda: tiny_model("llama-tied"),
    "adapters": adapted_model,
}


@pytest.mark.parametrize("name", POLICIES)
def test_kl_is_exactly_zero_at_first_and_measured_from_there(name):
    policy = Policy(POLICIES[name]()).train()
    reference = Reference(policy)
    batch = tiny_batch()
    before = reference.logprobs(batch, temperature=0.7)
    now = statistics_of(policy, batch, temperature=0.7)
    assert torch.equal(now.logprobs, before)
    assert not before.requires_grad
    learn(policy)
    assert torch.equal(reference.logprobs(batch, temperature=0.7), before)
    assert not torch.allclose(statistics_of(policy, batch, temperature=0.7).logprobs, before)
    assert policy.training
    assert any(parameter.requires_grad for parameter in policy.parameters())


def test_a_copy_has_the_experts_of_the_compressed_policy_and_learns_nothing():
    policy = Policy(compressed("qwen3_moe"))
    reference = Reference(policy)
    assert reference.is_copy
    copied = expert_layers(reference.policy.plain)
    assert [layer.num_physical_experts for layer in copied] == [4, 4]
    assert [layer.num_experts for layer in copied] == [8, 8]
    assert not any(parameter.requires_grad for parameter in reference.policy.parameters())
    own = {parameter.data_ptr() for parameter in policy.parameters()}
    assert not own & {parameter.data_ptr() for parameter in reference.policy.parameters()}


def test_idle_adapters_need_no_copy():
    policy = Policy(adapted_model())
    reference = Reference(policy)
    assert not reference.is_copy
    assert reference.policy is policy


def test_adapters_that_have_learned_already_are_part_of_the_reference():
    policy = Policy(adapted_model())
    learn(policy)
    batch = tiny_batch()
    with torch.no_grad():
        before = statistics_of(policy, batch, temperature=1.0).logprobs
    reference = Reference(policy)
    assert reference.is_copy
    learn(policy)
    assert torch.equal(reference.logprobs(batch, temperature=1.0), before)
