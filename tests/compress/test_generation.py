import random

import pytest
import torch
from moekit.compress import generation
from moekit.compress.generation import (
    Question,
    ends_in_loop,
    generate_completions,
    loop_share,
    split_questions,
    task_accuracy,
)
from moekit.moe.data import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

EOS, PAD = 256, 257
PROMPTS = ["a much longer prompt than the others", "x", "some words", "yz", "one more"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*alphabet, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen3MoeForCausalLM(config).eval()


def greedy_loop(model, prompt: str, new_tokens: int) -> list[int]:
    """One prompt at a time, no cache, no padding."""
    ids = torch.tensor([byte_tokenizer()(prompt).input_ids])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize(
    ("tokens", "is_loop"),
    [
        ([], False),
        ([7] * 23, False),
        ([7] * 24, True),
        ([1, 2, 3, *[7] * 24], True),
        ([*[7] * 40, 1], False),
        ([*[7] * 40, EOS], False),
        (list(range(10)) * 3, True),
        ((list(range(10)) * 3)[1:], False),
        ([5, *list(range(8)) * 4, 0, 1, 2], True),
        (list(range(16)) * 3, True),
        (list(range(17)) * 9, False),
        (list(range(100)), False),
    ],
)
def test_loops_by_hand(tokens, is_loop):
    assert ends_in_loop(tokens) is is_loop


def test_loops_equal_a_search_over_every_tail():
    def search(tokens):
        return any(
            all(tokens[-k] == tokens[-k - period] for k in range(1, length - period + 1))
            for period in range(1, 4)
            for length in range(max(3 * period, 8), len(tokens) + 1)
        )

    rng = random.Random(0)
    found = []
    for _ in range(500):
        piece = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
        tokens = [rng.randrange(3) for _ in range(rng.randrange(9))] + (piece * 9)[: rng.randrange(6, 14)]
        found.append(search(tokens))
        assert ends_in_loop(tokens, max_period=3, min_tokens=8) is found[-1]
    assert 50 < sum(found) < 450


def test_the_share_of_loops():
    assert loop_share([[7] * 30, [1, 2, 3], [1, 2] * 12, []]) == 0.5
    with pytest.raises(ValueError, match="no completions"):
        loop_share([])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_completions_equal_greedy_one_by_one(batch_size):
    model = tiny_model()

    completions = generate_completions(
        model, byte_tokenizer(), PROMPTS, max_new_tokens=9, batch_size=batch_size
    )

    assert completions == [greedy_loop(model, prompt, 9) for prompt in PROMPTS]


def test_the_models_own_sampling_settings_do_not_matter():
    model = tiny_model()
    expected = generate_completions(model, byte_tokenizer(), PROMPTS, max_new_tokens=9)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, top_k=3)
    model.train()

    assert generate_completions(model, byte_tokenizer(), PROMPTS, max_new_tokens=9) == expected
    assert model.training


def test_a_checkpoint_that_asks_for_router_logits_generates_all_the_same():
    model, tokenizer = tiny_model(), byte_tokenizer()
    expected = generate_completions(model, tokenizer, ["ab", "abcd"], max_new_tokens=4)
    model.config.output_router_logits = True
    assert generate_completions(model, tokenizer, ["ab", "abcd"], max_new_tokens=4) == expected
    assert model.config.output_router_logits is True


def test_a_completion_ends_with_its_end_of_sequence_token():
    model = tiny_model()
    free = [greedy_loop(model, prompt, 9) for prompt in PROMPTS]
    end = free[0][4]
    model.generation_config.eos_token_id = [EOS, end]

    completions = generate_completions(model, byte_tokenizer(), PROMPTS, max_new_tokens=9)

    assert completions == [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert len(completions[0]) <= 5


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([], 4, "no prompts"),
        (["x", ""], 4, "prompt 1 has no tokens"),
        (["x", "y" * 60], 5, "longest prompt has 60 tokens; with max_new_tokens=5 .* context of 64"),
        (["x"], 0, "max_new_tokens=0"),
    ],
)
def test_prompts_that_cannot_be_completed_are_refused(prompts, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate_completions(tiny_model(), byte_tokenizer(), prompts, max_new_tokens=new_tokens)


def test_questions_by_hand():
    documents = [
        Document("Q: 1 + 1 =\nA: 2\n", "sums"),
        Document("no question", "prose"),
        Document("Q: a\nA: b\n\nQ: c\nA: d\nand more", "few-shot"),
        Document("Q: open\nA: \n", "open"),
    ]

    assert split_questions(documents) == [
        Question("Q: 1 + 1 =\nA:", "2", "sums"),
        Question("Q: a\nA: b\n\nQ: c\nA:", "d", "few-shot"),
    ]


def test_spaces_after_the_marker_belong_to_the_answer():
    questions = split_questions([Document("Review: fine\nSentiment: positive\n", "s")], "Sentiment: ")

    assert questions == [Question("Review: fine\nSentiment:", "positive", "s")]
    with pytest.raises(ValueError, match="blank"):
        split_questions([], " ")


def test_an_answer_is_right_only_letter_by_letter(monkeypatch):
    tokenizer = byte_tokenizer()
    said = {"one": " 41\nQ: next", "two": " 41 or", "three": "42\n", "four": "", "five": "\n41<eos>"}
    documents = [Document(f"{name}\nA: 41\n", "d") for name in said]

    def canned(model, prompt_ids, config):
        names = [str(tokenizer.decode(ids)).partition("\n")[0] for ids in prompt_ids]
        return [tokenizer(said[name]).input_ids[: config.max_new_tokens] for name in names]

    monkeypatch.setattr(generation, "_generate", canned)

    right = task_accuracy(tiny_model(), tokenizer, documents, batch_size=2)

    assert right == [True, False, False, False, True]


def test_a_model_that_gives_its_own_answers_is_always_right():
    model, tokenizer = tiny_model(), byte_tokenizer()
    letters = tokenizer("abcdefghijklmnop").input_ids
    silent = torch.full((258,), -1e4)
    silent[letters] = 0
    model.lm_head.bias = torch.nn.Parameter(silent)
    model.generation_config.eos_token_id = letters[:6]
    prompts = [f"{text[:9]}\nA:" for text in PROMPTS]
    answers = [
        str(tokenizer.decode(ids))
        for ids in generate_completions(model, tokenizer, prompts, max_new_tokens=40)
    ]
    documents = [Document(f"{p} {a}\n", "d") for p, a in zip(prompts, answers, strict=True)]
    documents[2] = Document(f"{prompts[2]} {answers[2]}x\n", "d")

    assert task_accuracy(model, tokenizer, documents) == [True, True, False, True, True]


def test_documents_without_questions_are_refused():
    with pytest.raises(ValueError, match="no document holds the answer marker"):
        task_accuracy(tiny_model(), byte_tokenizer(), [Document("prose", "d")])
