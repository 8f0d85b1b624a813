"""Sampling from the model in training: the right tokens, their log-probs, and a model that is left alone."""

import pytest
import torch
from moekit.rl.generation import decoding
from moekit.rl.generation.embedded import EmbeddedGenerator
from moekit.rl.generation.generator import Generator, SampleRequest
from moekit.rl.generation.settings import SamplingSettings
from transformers import BertConfig, BertModel, GenerationConfig, T5Config, T5ForConditionalGeneration

from ...moe.families import FAMILIES
from .models import BUILDERS, EOS, PAD, VOCAB, full_logits, llama, model_of, prompts_of, requests_of, same

LENGTHS = (7, 3, 11, 5)
UNABLE = ("diffusion_gemma", "openai_privacy_filter", "switch_transformers")
PADDING = [name for name in BUILDERS if name not in ("qwen3_next", "minimax")]


def generator_of(model, **options) -> EmbeddedGenerator:
    return EmbeddedGenerator(model, **{"eos_token_ids": (EOS,), "pad_token_id": PAD, **options})


def settings(**options) -> SamplingSettings:
    return SamplingSettings(**{"max_new_tokens": 16, **options})


def greedy_by_transformers(model, prompts, ends) -> list[tuple[int, ...]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(do_sample=False, max_new_tokens=16, pad_token_id=PAD, eos_token_id=list(ends))
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:]
    found = []
    for row in output.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        found.append(tuple(row[: end + 1]))
    return found


def common_tokens(model, prompts) -> tuple[int, ...]:
    """Two tokens that greedy completions hold, so that they end at different places."""
    written = greedy_by_transformers(model, prompts, (VOCAB - 1,))
    return written[0][len(written[0]) // 3], written[1][len(written[1]) // 2]


def test_it_is_a_generator():
    assert isinstance(generator_of(model_of("llama")), Generator)


@pytest.mark.parametrize("name", PADDING)
def test_greedy_equals_transformers(name):
    model, prompts = model_of(name), prompts_of(*LENGTHS)
    ends = common_tokens(model, prompts)
    wanted = greedy_by_transformers(model, prompts, ends)
    assert len({len(ids) for ids in wanted}) > 1
    samples = generator_of(model, eos_token_ids=ends).generate(requests_of(*LENGTHS), settings(greedy=True))
    assert [group[0].ids for group in samples] == wanted
    assert [group[0].is_finished for group in samples] == [ids[-1] in ends for ids in wanted]


@pytest.mark.parametrize("name", BUILDERS)
def test_logprobs_are_those_of_one_forward_over_the_text(name):
    model = model_of(name)
    requests = requests_of(*LENGTHS, num_samples=3)
    chosen = settings(temperature=0.8, top_k=20)
    lengths = set()
    for request, group in zip(requests, generator_of(model).generate(requests, chosen), strict=True):
        for sample in group:
            logprobs = (full_logits(model, request.prompt_ids, sample.ids) / 0.8).log_softmax(-1)
            wanted = logprobs.gather(1, torch.tensor(sample.ids).unsqueeze(1)).squeeze(1)
            # Linear attention computes a text in chunks, and tokens one by one.
            tolerance = 1e-4 if name == "qwen3_next" else 1e-5
            torch.testing.assert_close(sample.logprobs, wanted, rtol=0, atol=tolerance)
            assert sample.is_finished == (sample.ids[-1] == EOS)
            assert EOS not in sample.ids[:-1]
            lengths.add(len(sample.ids))
    assert 16 in lengths


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_on_as_its_own_cache_does(name):
    model = FAMILIES[name]()
    if name in UNABLE:
        with pytest.raises(ValueError, match="use a causal language model"):
            generator_of(model)
        return
    generator = generator_of(model)
    # Sparse attention breaks ties as it likes, so cached forwards of one row are the measure.
    alone = [
        generator.generate([SampleRequest(prompt_ids=p, num_samples=1, seed=0)], settings(greedy=True))[0][0]
        for p in prompts_of(*LENGTHS)
    ]
    requests = [SampleRequest(prompt_ids=p, num_samples=2, seed=0) for p in prompts_of(*LENGTHS)]
    together = generator.generate(requests, settings(greedy=True))
    assert [[s.ids for s in group] for group in together] == [[s.ids, s.ids] for s in alone]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3_next", "minimax")]


@pytest.mark.parametrize("name", ["qwen3_moe", *SLOW])
def test_a_sample_depends_on_its_seed_alone(name, monkeypatch):
    requests = requests_of(5, 3, 5, num_samples=3)
    ends = tuple(range(8))  # many, so that rows end early and leave
    generator = generator_of(model_of(name), eos_token_ids=ends)
    wanted = generator.generate(requests, settings())
    assert len({len(s.ids) for group in wanted for s in group}) > 3
    torch.rand(5)
    assert same(generator.generate(requests, settings()), wanted)
    assert same(generator.generate(requests[::-1], settings())[::-1], wanted)
    assert same(generator.generate(requests[1:2], settings()), wanted[1:2])
    for max_batch in (2, 5):
        split = generator_of(model_of(name), eos_token_ids=ends, max_batch=max_batch)
        assert same(split.generate(requests, settings()), wanted)
    monkeypatch.setattr(decoding, "COMPACTION_SHARE", 2.0)  # nobody leaves
    assert same(generator.generate(requests, settings()), wanted)
    monkeypatch.setattr(decoding, "COMPACTION_SHARE", 0.0)
    monkeypatch.setattr(decoding, "STEPS_BETWEEN_LOOKS", {})
    assert same(generator.generate(requests, settings()), wanted)


def test_samples_and_seeds_differ():
    generator = generator_of(model_of("llama"))
    prompt = prompts_of(5)[0]
    requests = [SampleRequest(prompt_ids=prompt, num_samples=4, seed=seed) for seed in (0, 1)]
    found = [sample.ids for group in generator.generate(requests, settings()) for sample in group]
    assert len(set(found)) == 8


def test_the_first_tokens_come_as_often_as_their_probability():
    model = model_of("qwen3_moe")
    prompt = prompts_of(4)[0]
    request = SampleRequest(prompt_ids=prompt, num_samples=4000, seed=0)
    generator = generator_of(model, max_batch=4000)
    group = generator.generate([request], settings(max_new_tokens=1, top_k=8, temperature=2.0))[0]
    logits = full_logits(model, prompt, (0,))[0] / 2
    top = logits.topk(8)
    counts = torch.tensor([sample.ids[0] for sample in group]).bincount(minlength=VOCAB)[top.indices]
    expected = 4000 * top.values.softmax(-1)
    assert counts.sum() == 4000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 0.1 % of chi-square with 7 degrees


def counting_forwards(model, monkeypatch) -> list[tuple[int, ...]]:
    shapes, forward = [], model.forward

    def counted(input_ids, **inputs):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **inputs)

    counted.__signature__ = decoding.signature(forward)
    monkeypatch.setattr(model, "forward", counted)
    return shapes


def test_a_prompt_is_read_once_and_finished_rows_leave(monkeypatch):
    model = llama()
    shapes = counting_forwards(model, monkeypatch)
    prompts = prompts_of(5, 5)
    seeds = [(prompts[0], 0), (prompts[0], 1), (prompts[1], 2)]  # two requests share a prompt
    requests = [SampleRequest(prompt_ids=p, num_samples=4, seed=seed) for p, seed in seeds]
    groups = generator_of(model, eos_token_ids=tuple(range(12))).generate(requests, settings())
    assert shapes[0] == (2, 5)
    assert shapes[1][1] == 1
    longest = max(len(sample.ids) for group in groups for sample in group)
    assert len(shapes) == longest
    rows = [shape[0] for shape in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    for step, num_rows in enumerate(rows, start=1):
        unfinished = sum(len(sample.ids) > step for group in groups for sample in group)
        assert unfinished <= num_rows < max(unfinished / 0.75, unfinished + 1) + 1e-9


def test_prompts_of_similar_length_share_a_batch(monkeypatch):
    model = llama()
    shapes = counting_forwards(model, monkeypatch)
    generator_of(model, max_batch=2).generate(requests_of(9, 2, 8, 3), settings(max_new_tokens=1))
    assert shapes == [(2, 3), (2, 9)]


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2"])
def test_the_model_is_left_as_it_was(name):
    model = BUILDERS[name]().train()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    if name == "qwen3_moe":
        model.config.output_router_logits = True
    config = model.config.to_dict()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    samples = generator_of(model).generate(requests_of(5, 3, num_samples=2), settings())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.is_gradient_checkpointing
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not samples[0][0].logprobs.requires_grad
    ids = torch.tensor([samples[0][0].ids])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.ndim < 3)


def test_dropout_plays_no_part():
    model = llama().train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    wanted = generator_of(model_of("llama")).generate(requests_of(5), settings())
    assert same(generator_of(model).generate(requests_of(5), settings()), wanted)


def test_the_mode_comes_back_after_an_error():
    model = llama().train()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite at token 0 of sample 0 of request 1"):
        generator_of(model).generate(requests_of(5, 3), settings())
    assert model.training


def test_logits_that_overflow_are_refused():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    for chosen in (settings(), settings(greedy=True), settings(top_p=0.5)):
        with pytest.raises(ValueError, match="not finite"):
            generator_of(model).generate(requests_of(5), chosen)


def test_without_an_end_token_all_meet_the_limit():
    groups = generator_of(model_of("llama"), eos_token_ids=()).generate(requests_of(5, 3), settings())
    assert [(len(group[0].ids), group[0].is_finished) for group in groups] == [(16, False)] * 2


def test_an_end_token_at_the_limit_still_ends():
    model, prompt = model_of("llama"), prompts_of(5)[0]
    request = SampleRequest(prompt_ids=prompt, num_samples=1, seed=0)
    ids = generator_of(model, eos_token_ids=()).generate([request], settings(greedy=True))[0][0].ids
    length = next(i for i in range(1, 17) if ids[i - 1] not in ids[: i - 1] and i > 1)
    last = generator_of(model, eos_token_ids=(ids[length - 1],))
    sample = last.generate([request], settings(greedy=True, max_new_tokens=length))[0][0]
    assert (sample.ids, sample.is_finished) == (ids[:length], True)


def test_no_requests_give_no_samples():
    assert generator_of(model_of("llama")).generate([], settings()) == []


def test_a_text_as_long_as_the_context_is_written_and_no_longer():
    generator = generator_of(model_of("llama"), eos_token_ids=())
    assert len(generator.generate(requests_of(50), settings(max_new_tokens=14))[0][0].ids) == 14
    with pytest.raises(ValueError, match=r"50 tokens; with max_new_tokens=15 .* context of 64"):
        generator.generate(requests_of(3, 50), settings(max_new_tokens=15))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_that_the_model_lacks_is_refused(token):
    request = SampleRequest(prompt_ids=(5, token), num_samples=1, seed=0)
    with pytest.raises(ValueError, match=f"prompt 0 .* vocabulary of {VOCAB}"):
        generator_of(model_of("llama")).generate([request], settings())


def test_what_cannot_continue_text_is_refused():
    bert = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    for model in (bert, t5):
        with pytest.raises(ValueError, match="use a causal language model"):
            generator_of(model)
    with pytest.raises(ValueError, match="max_batch=0"):
        generator_of(model_of("llama"), max_batch=0)
