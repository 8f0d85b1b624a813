import pytest
import torch
from moekit.compress import throughput
from moekit.moe.data import TokenBlocks
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def tiny_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


def blocks() -> TokenBlocks:
    ids = torch.randint(23, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return TokenBlocks(ids, mask, ("a", "a", "b"))


def test_tokens_are_divided_by_seconds(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("moekit.compress.throughput.time.perf_counter", lambda: next(clock) * 0.5)
    model = tiny_model()

    assert throughput.prefill_throughput(model, blocks(), batch_size=2) == (40 + 10) / 0.5
    assert throughput.decode_throughput(model, blocks(), batch_size=2, new_tokens=5, repeats=1) == 2 * 5 / 0.5
    assert model.training


def test_exactly_the_tokens_asked_for_are_generated():
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(22))
    generated = []
    generate = model.generate
    model.generate = lambda **arguments: generated.append(generate(**arguments))

    throughput.decode_throughput(model, blocks(), batch_size=2, new_tokens=6, repeats=2)

    assert [tuple(output.shape) for output in generated] == [(2, 10 + 6)] * 3


def test_models_are_timed_in_turns_and_the_first_round_does_not_count():
    rates = {"a": iter([900.0, 1.0, 3.0, 2.0]), "b": iter([900.0, 5.0, 4.0, 6.0])}
    order = []

    def measure(name):
        order.append(name)
        return next(rates[name])

    medians = throughput._median_rates([lambda: measure("a"), lambda: measure("b")], repeats=3)

    assert medians == [2.0, 5.0]
    assert order == ["a", "b"] * 4


def test_both_models_get_both_speeds():
    prefill, decode = throughput.compare_throughput(tiny_model(), tiny_model(), blocks(), repeats=1)

    assert min(prefill.original, prefill.compressed, decode.original, decode.compressed) > 0


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="no blocks"):
        throughput.prefill_throughput(tiny_model(), blocks().select([]))
    with pytest.raises(ValueError, match="repeats=0"):
        throughput.prefill_throughput(tiny_model(), blocks(), repeats=0)
