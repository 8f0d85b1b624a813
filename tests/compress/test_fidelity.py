import json
import math

import numpy as np
import pytest
import torch
from moekit.compress.fidelity import compare_models, confidence_interval
from moekit.moe.data import TokenBlocks
from transformers import (
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

VOCABULARY = 23


def tiny_model(seed: int, vocab_size: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
    )
    return Qwen3MoeForCausalLM(config).eval()


def random_blocks(lengths: list[int], seq_len: int = 7) -> TokenBlocks:
    ids = torch.randint(VOCABULARY, (len(lengths), seq_len))
    mask = (torch.arange(seq_len) < torch.tensor(lengths).unsqueeze(1)).long()
    return TokenBlocks(ids, mask, tuple("ab"[row % 2] for row in range(len(lengths))))


def loop_reference(original, compressed, ids_row: torch.Tensor) -> list[tuple[float, float, float, float]]:
    """Both negative log-likelihoods, KL and agreement of each token of one unpadded block, one by one."""
    rows = []
    for position in range(1, len(ids_row)):
        logps = [
            model(ids_row[None, :position]).logits[0, -1].double().log_softmax(-1)
            for model in (original, compressed)
        ]
        target = ids_row[position]
        kl = sum(float(p.exp() * (p - q)) for p, q in zip(*logps, strict=True))
        same = float(logps[0].argmax() == logps[1].argmax())
        rows.append((-float(logps[0][target]), -float(logps[1][target]), kl, same))
    return rows


def test_equal_models_lose_nothing():
    model = tiny_model(0)

    report = compare_models(model, model, random_blocks([7, 7, 4]))

    for part in (report.overall, *report.domains):
        assert part.kl.value == 0
        assert part.top1_agreement.value == 1
        assert part.perplexity_ratio.value == 1
        assert part.perplexity_original == part.perplexity_compressed


def test_the_figures_equal_a_loop_over_tokens():
    original, compressed = tiny_model(0), tiny_model(1)
    lengths = [7, 5, 3, 7]
    blocks = random_blocks(lengths)

    report = compare_models(original, compressed, blocks, batch_size=3)

    with torch.no_grad():
        by_block = [
            loop_reference(original, compressed, blocks.input_ids[row, :length])
            for row, length in enumerate(lengths)
        ]
    for part, rows in ((report.overall, range(4)), (report.domains[0], (0, 2)), (report.domains[1], (1, 3))):
        tokens = np.array([token for row in rows for token in by_block[row]])
        nll_original, nll_compressed, kl, agreement = tokens.mean(0)
        assert part.num_tokens == len(tokens)
        assert part.perplexity_original.value == pytest.approx(math.exp(nll_original), rel=1e-5)
        assert part.perplexity_compressed.value == pytest.approx(math.exp(nll_compressed), rel=1e-5)
        assert part.perplexity_ratio.value == pytest.approx(math.exp(nll_compressed - nll_original), rel=1e-5)
        assert part.kl.value == pytest.approx(kl, rel=1e-4)
        assert part.top1_agreement.value == pytest.approx(agreement)
        assert part.kl.low <= part.kl.value <= part.kl.high
    assert [domain.domain for domain in report.domains] == ["a", "b"]
    assert report.overall.num_tokens == sum(domain.num_tokens for domain in report.domains)


@pytest.mark.parametrize("chunk", [1, 4 * 2 * VOCABULARY, 2**24])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_batches_chunks_and_padding_change_nothing(monkeypatch, batch_size, chunk):
    original, compressed = tiny_model(0), tiny_model(1)
    blocks = random_blocks([7, 5, 2, 1, 7])
    expected = compare_models(original, compressed, blocks).overall
    other_ids = torch.where(blocks.attention_mask.bool(), blocks.input_ids, torch.randint(VOCABULARY, (5, 7)))
    monkeypatch.setattr("moekit.compress.fidelity.CHUNK_ELEMENTS", chunk)

    part = compare_models(
        original, compressed, TokenBlocks(other_ids, blocks.attention_mask, blocks.domains), batch_size
    ).overall

    assert part.num_tokens == expected.num_tokens == 6 + 4 + 1 + 0 + 6
    for name in ("perplexity_original", "perplexity_compressed", "kl", "top1_agreement"):
        assert getattr(part, name).value == pytest.approx(getattr(expected, name).value, rel=1e-5)


def test_the_report_is_json_and_the_models_keep_their_mode():
    original, compressed = tiny_model(0), tiny_model(1).train()
    blocks = random_blocks([7, 7])

    report = compare_models(original, compressed, blocks)

    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert report.to_dict()["domains"][1]["kl"]["value"] == report.domains[1].kl.value
    assert report.data_fingerprint == blocks.fingerprint
    assert compressed.training
    assert not original.training


def test_an_encoder_decoder_predicts_the_second_half():
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    blocks = random_blocks([8, 6], seq_len=8)

    report = compare_models(model, model, blocks)

    assert report.overall.num_tokens == 4 + 2
    assert report.overall.kl.value == 0
    with torch.no_grad():
        row = blocks.input_ids[:1]
        loss = model.eval()(input_ids=row[:, :4], labels=row[:, 4:]).loss
    assert report.domains[0].perplexity_original.value == pytest.approx(float(loss.exp()), rel=1e-5)


def test_damaged_weights_name_the_model():
    original, compressed = tiny_model(0), tiny_model(1)
    compressed.get_output_embeddings().weight.data[3] = float("nan")

    with pytest.raises(ValueError, match=r"compressed model .* NaN or infinite"):
        compare_models(original, compressed, random_blocks([7]))
    with pytest.raises(ValueError, match=r"original model .* NaN or infinite"):
        compare_models(compressed, original, random_blocks([7]))


def test_what_cannot_be_compared_is_refused():
    blocks = random_blocks([7])
    high = TokenBlocks(blocks.input_ids + VOCABULARY, blocks.attention_mask, blocks.domains)

    with pytest.raises(ValueError, match="vocabulary has 23 entries and the compressed one's 29"):
        compare_models(tiny_model(0), tiny_model(0, 29), blocks)
    with pytest.raises(ValueError, match="another model's tokenizer"):
        compare_models(tiny_model(0), tiny_model(0), high)
    with pytest.raises(ValueError, match="no held-out blocks"):
        compare_models(tiny_model(0), tiny_model(0), blocks.select([]))
    with pytest.raises(ValueError, match="too short to predict"):
        compare_models(tiny_model(0), tiny_model(0), random_blocks([1, 1]))


def test_equal_values_have_no_width_and_the_mean_is_weighted():
    estimate = confidence_interval(np.full(5, 2.5), np.arange(1.0, 6.0))
    assert estimate.value == estimate.low == estimate.high == 2.5

    estimate = confidence_interval(np.array([1.0, 4.0, 100.0]), np.array([2.0, 1.0, 0.0]))
    assert estimate.value == pytest.approx(2.0)
    assert (estimate.low, estimate.high) == (1.0, 4.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        weights = rng.uniform(1, 3, size=60)
        estimate = confidence_interval(rng.normal(0.7, 1.0, size=60), weights, resamples=400, seed=trial)
        hits += estimate.low <= 0.7 <= estimate.high

    assert 0.91 < hits / 300 < 0.98


def test_one_unit_has_no_interval():
    estimate = confidence_interval(np.array([0.5, 3.0]), np.array([2.0, 0.0]))

    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)


def test_answers_that_are_true_or_false_are_shares():
    estimate = confidence_interval(np.array([True, False, True, True]), np.ones(4))

    assert estimate.value == 0.75


@pytest.mark.parametrize("weights", [np.zeros(2), np.array([1.0, -1.0])])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights must"):
        confidence_interval(np.ones(2), weights)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="non-empty"):
        confidence_interval(np.ones(0), np.ones(0))
