import pytest
import torch
from moekit.rl.generation.embedded import EmbeddedGenerator
from moekit.rl.generation.settings import SamplingSettings
from moekit.rl.generation.stopping import StopTexts

from .models import EOS, PAD, letters, model_of, requests_of, same


def generator(tokenizer=None, **options) -> EmbeddedGenerator:
    return EmbeddedGenerator(
        model_of("llama"), eos_token_ids=(EOS,), pad_token_id=PAD, tokenizer=tokenizer, **options
    )


def test_a_completion_ends_with_the_token_that_completes_a_text():
    tokenizer = letters()
    requests = requests_of(7, 3, num_samples=4)
    free = generator().generate(requests, SamplingSettings(max_new_tokens=24))
    pair = tokenizer.decode(free[0][0].ids[5:7])
    stop = (pair, "Q", "=")
    stopped = generator(tokenizer).generate(requests, SamplingSettings(max_new_tokens=24, stop=stop))
    num_cut = 0
    for long, short in zip((s for g in free for s in g), (s for g in stopped for s in g), strict=True):
        lengths = range(1, len(long.ids) + 1)
        wanted = next((n for n in lengths if any(t in tokenizer.decode(long.ids[:n]) for t in stop)), None)
        if wanted is None:
            assert short.ids == long.ids
            assert short.is_finished == long.is_finished
            continue
        num_cut += 1
        assert short.ids == long.ids[:wanted]
        assert short.is_finished
        assert len(short.logprobs) == wanted
    assert num_cut > 1
    assert same(
        generator(tokenizer, max_batch=3).generate(requests, SamplingSettings(max_new_tokens=24, stop=stop)),
        stopped,
    )


def test_texts_of_special_tokens_stop_and_the_prompt_does_not():
    tokenizer = letters()
    texts = StopTexts(tokenizer, ["<eos>"])
    assert texts.are_in(torch.tensor([[5, 6, EOS], [5, 6, 7]])) == [True, False]
    assert texts.tail_length >= len("<eos>")
    requests = requests_of(3)
    text = tokenizer.decode(requests[0].prompt_ids)
    settings = SamplingSettings(max_new_tokens=4, stop=(text,))
    assert len(generator(tokenizer).generate(requests, settings)[0][0].ids) == 4


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop texts need the tokenizer"):
        generator().generate(requests_of(3), SamplingSettings(max_new_tokens=4, stop=("x",)))
