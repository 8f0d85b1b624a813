"""What a policy says of tokens, against the same from the model's own logits."""

from typing import Any

import pytest
import torch
from moekit.moe import UnsupportedModelError, expert_layers, load_balance_loss
from moekit.moe.router_replay import record_choices, replay_choices
from moekit.rl.policy import Policy, check_precision, policy_inputs, statistics_of, without_dropout
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .policies import LENGTHS, POLICIES, TEXT, VOCABULARY, compressed, tiny_batch, tiny_model

ROW = 4 * VOCABULARY
"""Bytes of one row of logits."""
EVERYTHING: dict[str, Any] = {"with_entropy_gradient": True, "with_mean_vocab": True}


def dense(model, batch, temperature):
    """Log-probs, entropies and vocabulary means of the completions from whole logits."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.token_mask], 1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    start = batch.prompt_ids.shape[1]
    logprobs = (logits[:, start - 1 : -1] / temperature).log_softmax(-1)
    own = logprobs.gather(2, batch.completion_ids[..., None]).squeeze(2)
    return own, -(logprobs.exp() * logprobs).sum(-1), logprobs.mean(-1)


def said_by(now):
    return now.logprobs, now.entropies, now.mean_vocab_logprobs


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_of(values, mask):
    """Different weights for every token and statistic, so that nothing cancels."""
    weights = torch.Generator().manual_seed(0)
    total = 0.0
    for value in values:
        weight = torch.randn(value.shape, generator=weights, dtype=value.dtype)
        total = total + (weight * torch.where(mask, value, 0)).sum()
    return total


def assert_close_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = (
            {"rtol": 1e-7, "atol": 1e-9} if value.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        )
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def wide(model):
    if model.config.model_type == "gemma2":
        return model  # its attention gives NaN for padding in float64
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the others know no float64
    return model.double()


@pytest.mark.parametrize("logit_bytes", [ROW, 4 * ROW, 2**20])
@pytest.mark.parametrize("name", POLICIES)
def test_values_and_gradients_equal_those_of_whole_logits(name, logit_bytes):
    model = wide(tiny_model(name))
    batch = tiny_batch()
    policy = Policy(model, logit_bytes=logit_bytes)
    expected = dense(model, batch, 0.7)
    loss_of(expected, batch.token_mask).backward()
    wanted = gradients(model)
    found = said_by(statistics_of(policy, batch, temperature=0.7, **EVERYTHING))
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == next(model.parameters()).dtype
        torch.testing.assert_close(value[batch.token_mask], other[batch.token_mask])
        assert not value[~batch.token_mask].any()
    loss_of(found, batch.token_mask).backward()
    assert_close_gradients(gradients(model), wanted)
    assert wanted


def test_a_compressed_model_says_the_same():
    model = wide(compressed("qwen3_moe"))
    batch = tiny_batch()
    expected = dense(model, batch, 1.0)
    now = statistics_of(Policy(model), batch, temperature=1.0)
    torch.testing.assert_close(now.logprobs[batch.token_mask], expected[0][batch.token_mask])
    assert now.mean_vocab_logprobs is None
    assert not now.entropies.requires_grad
    assert now.logprobs.requires_grad


class WidestLogits(TorchDispatchMode):
    """Most rows of a tensor whose last axis is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            is_wide = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,)
            if is_wide and tensor.shape != (TEXT["hidden_size"], VOCABULARY):  # the head, transposed
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def test_logits_of_more_than_a_chunk_are_never_there():
    model = tiny_model("llama")
    batch = tiny_batch([(4, 6), (2, 6), (3, 6)])
    policy = Policy(model, logit_bytes=4 * ROW)
    with WidestLogits() as seen:
        now = statistics_of(policy, batch, temperature=0.7, **EVERYTHING)
        loss_of(said_by(now), batch.token_mask).backward()
    assert seen.rows == 4
    with WidestLogits() as seen:
        dense(model, batch, 0.7)
    assert seen.rows > 18


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
def test_padding_does_not_matter(name):
    policy = Policy(tiny_model(name))
    batch = tiny_batch()
    together = statistics_of(policy, batch, temperature=1.0, with_mean_vocab=True)
    for row, (_, completion) in enumerate(LENGTHS):
        alone = statistics_of(policy, batch.select([row]), temperature=1.0, with_mean_vocab=True)
        for one, all_ in zip(said_by(alone), said_by(together), strict=True):
            torch.testing.assert_close(one[0], all_[row, :completion], rtol=1e-4, atol=1e-5)


def test_no_token_at_all_gives_zeros_and_a_gradient_for_every_parameter():
    model = tiny_model("llama")
    batch = tiny_batch([(3, 2)])
    batch = batch.with_(token_mask=torch.zeros_like(batch.token_mask))
    now = statistics_of(Policy(model), batch, temperature=1.0)
    assert not now.logprobs.any()
    now.logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def lora(name, **options):
    model = tiny_model(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    return adapted


def test_adapters_count_and_alone_learn():
    adapted = lora("llama").double()
    batch = tiny_batch()
    policy = Policy(adapted, logit_bytes=4 * ROW)
    expected = dense(adapted, batch, 0.7)
    loss_of(expected, batch.token_mask).backward()
    wanted = gradients(adapted)
    assert wanted
    assert all("lora" in name for name in wanted)
    assert any("lm_head" in name for name in wanted)
    found = said_by(statistics_of(policy, batch, temperature=0.7, **EVERYTHING))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value[batch.token_mask], other[batch.token_mask])
    loss_of(found, batch.token_mask).backward()
    assert_close_gradients(gradients(adapted), wanted)


def test_learned_prompts_are_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="learns a prompt"):
        Policy(get_peft_model(tiny_model("llama"), config))


@pytest.mark.parametrize("name", ["llama", "olmoe", "redirect", "logsumexp"])
def test_activation_checkpointing_changes_nothing(name):
    model = tiny_model(name) if name in POLICIES else compressed("qwen3_moe", router=name)
    batch = tiny_batch()
    policy = Policy(model, with_router_loss=name != "llama", logit_bytes=4 * ROW)
    policy.train()
    without_dropout(model)

    def run():
        said = policy(**policy_inputs(batch), temperature=0.7, **EVERYTHING)
        loss = loss_of([said[key] for key in ("logprobs", "entropies")], batch.token_mask)
        (loss + said.get("router_loss", 0)).backward()
        return said, gradients(model)

    said, wanted = run()
    policy.plain.activation_checkpointing_enable()
    again, found = run()
    assert all(torch.equal(value, again[key]) for key, value in said.items())
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2"])
def test_bfloat16(name):
    model = tiny_model(name)
    batch = tiny_batch()
    with torch.no_grad():
        expected = statistics_of(Policy(model), batch, temperature=1.0)
    policy = Policy(model.bfloat16())
    now = statistics_of(policy, batch, temperature=1.0, **EVERYTHING)
    assert now.logprobs.dtype == now.entropies.dtype == torch.float32
    assert float((now.logprobs.detach() - expected.logprobs).abs().mean()) < 0.15
    loss_of(said_by(now), batch.token_mask).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_router_loss_is_that_of_the_models_own_routers():
    model = tiny_model("olmoe", output_router_logits=False)
    batch = tiny_batch()
    policy = Policy(model, with_router_loss=True)
    inputs = policy_inputs(batch)
    said = policy(**inputs, temperature=1.0)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, output_router_logits=True
    )
    terms = [
        load_balance_loss(logits, logits.topk(2, -1).indices, mask.flatten().bool())
        for logits in whole.router_logits
    ]
    torch.testing.assert_close(said["router_loss"], torch.stack(terms).mean())
    assert torch.equal(statistics_of(policy, batch, temperature=1.0).router_loss, said["router_loss"])
    said["router_loss"].backward()
    assert all(layer.router.weight.grad.any() for layer in policy.layers)
    with torch.no_grad():
        assert "router_loss" not in policy(**inputs, temperature=1.0)
    assert "router_loss" not in Policy(model)(**inputs, temperature=1.0)


def test_a_dense_model_has_no_router_loss():
    assert Policy(tiny_model("llama")).layers == []
    with pytest.raises(UnsupportedModelError):
        Policy(tiny_model("llama"), with_router_loss=True)


@pytest.mark.parametrize("is_replayed", [False, True])
@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_the_ratio_on_policy_is_exactly_one(name, is_replayed):
    model = tiny_model(name, attention_dropout=0.5).train()
    without_dropout(model)
    policy = Policy(model, logit_bytes=4 * ROW)
    policy.plain.activation_checkpointing_enable()
    batch = tiny_batch()
    with torch.no_grad(), record_choices(model, policy.layers) as choices:
        old = statistics_of(policy, batch, temperature=0.7)
    if not is_replayed:
        now = statistics_of(policy, batch, temperature=0.7)
    else:
        with replay_choices(model, choices, policy.layers):
            now = statistics_of(policy, batch, temperature=0.7)
            now.logprobs.sum().backward()
    assert torch.equal((now.logprobs - old.logprobs).exp(), torch.ones_like(old.logprobs))
    assert torch.equal(now.entropies, old.entropies)


def test_choices_fit_the_micro_batches_that_a_batch_is_cut_into():
    model = tiny_model("qwen3_moe")
    policy = Policy(model)
    batch = tiny_batch()
    with torch.no_grad():
        with record_choices(model, policy.layers) as choices:
            whole = statistics_of(policy, batch, temperature=1.0)
        for layer in expert_layers(model):
            layer.router.weight.add_(torch.randn_like(layer.router.weight))
        rows = [2, 1]
        with replay_choices(model, choices, policy.layers):
            replayed = statistics_of(policy, batch, temperature=1.0)
        part = batch.select(rows)
        with replay_choices(model, choices.select(rows), policy.layers):
            cut = statistics_of(policy, part, temperature=1.0)
    longest = part.completion_ids.shape[1]
    torch.testing.assert_close(cut.logprobs, replayed.logprobs[rows, :longest], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole.logprobs, replayed.logprobs)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "olmoe"])
def test_without_dropout_training_mode_is_exact(name):
    values = {"gpt2": {}, "mixtral": {}, "olmoe": {"attention_dropout": 0.5}}[name]
    model = tiny_model(name, **values)
    batch = tiny_batch()
    policy = Policy(model)
    with torch.no_grad():
        expected = statistics_of(policy, batch, temperature=1.0)
        policy.train()
        assert not torch.equal(statistics_of(policy, batch, temperature=1.0).logprobs, expected.logprobs)
        without_dropout(model)
        assert torch.equal(statistics_of(policy, batch, temperature=1.0).logprobs, expected.logprobs)
    assert model.training


def test_adapters_lose_their_dropout_too():
    adapted = lora("llama", lora_dropout=0.5)
    batch = tiny_batch()
    policy = Policy(adapted).train()
    without_dropout(adapted)
    with torch.no_grad():
        first, second = (statistics_of(policy, batch, temperature=1.0).logprobs for _ in range(2))
    assert torch.equal(first, second)


def test_a_model_that_draws_its_experts_is_refused():
    model = tiny_model("olmoe")

    def drawn(module, args, output):
        logits, weights, ids = output
        return logits, weights, torch.randint_like(ids, 8) if module.training else ids

    for layer in expert_layers(model):
        layer.router.register_forward_hook(drawn)
    with pytest.raises(ValueError, match="something else each time"):
        without_dropout(model)
    assert not model.training


def test_what_does_not_fit_is_refused():
    policy = Policy(tiny_model("llama"))
    inputs = policy_inputs(tiny_batch())
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            policy(**inputs, temperature=temperature)
    for length in (0, inputs["input_ids"].shape[1]):
        with pytest.raises(ValueError, match="num_completion"):
            policy(**inputs | {"num_completion": length}, temperature=1.0)
    with pytest.raises(ValueError, match="logit_bytes"):
        Policy(tiny_model("llama"), logit_bytes=0)
    with pytest.raises(ValueError, match="output_dtype"):
        check_precision({"logprobs": torch.zeros(2, 2, dtype=torch.bfloat16)})
