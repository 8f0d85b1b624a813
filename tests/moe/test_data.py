from collections import Counter

import pytest
import torch
from moekit.moe.data import Document, TokenBlocks, check_tokenizer, split_blocks, token_blocks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

EOS, PAD = 256, 257


def byte_tokenizer(*, adds_bos: bool = False, **special) -> PreTrainedTokenizerFast:
    """One token per byte, an eos and a pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*alphabet, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", EOS)]
        )
    names = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def text_of(blocks: TokenBlocks, row: int) -> str:
    kept = blocks.input_ids[row][blocks.attention_mask[row].bool()]
    return str(byte_tokenizer().decode(kept.tolist())).replace("<eos>", "|")


def test_blocks_are_the_document_cut_in_pieces():
    text = "abcdefghijklmnopqrstuvwxyz"

    blocks = token_blocks([Document(text, "d")], byte_tokenizer(), seq_len=9)

    assert sorted(text_of(blocks, row) for row in range(3)) == ["abcdefghi", "jklmnopqr", "stuvwxyz|"]
    assert blocks.num_tokens == 27


def test_documents_are_joined_by_eos_and_domains_never_mix():
    documents = [Document("a" * n, "a") for n in range(1, 9)] + [Document("b" * n, "b") for n in range(1, 9)]

    blocks = token_blocks(documents, byte_tokenizer(), seq_len=4)

    texts = [text_of(blocks, row) for row in range(len(blocks))]
    assert all(set(text) <= {domain, "|"} for text, domain in zip(texts, blocks.domains, strict=True))
    assert Counter("".join(texts)) == {"a": 36, "b": 36, "|": 16}
    assert len(set(blocks.domains[:11])) == 2, "the domains are not shuffled"


@pytest.mark.parametrize(
    ("length", "seq_len", "masks"),
    [
        (7, 4, [4, 4]),  # 8 tokens with the eos: nothing is left over
        (9, 4, [2, 4, 4]),
        (8, 4, [1, 4, 4]),  # a quarter full: kept
        (8, 8, [8]),  # an eighth full: dropped
    ],
)
def test_a_tail_is_kept_from_a_quarter_of_a_block_on(length, seq_len, masks):
    blocks = token_blocks([Document("x" * length, "d")], byte_tokenizer(), seq_len=seq_len)

    assert sorted(blocks.attention_mask.sum(1).tolist()) == masks
    assert (blocks.input_ids[blocks.attention_mask == 0] == PAD).all()
    assert (blocks.attention_mask.diff(dim=1) <= 0).all(), "padding is not on the right"


def test_a_small_domain_keeps_its_only_block():
    blocks = token_blocks(
        [Document("x" * 40, "large"), Document("y", "small")], byte_tokenizer(pad_token=None), seq_len=16
    )

    row = blocks.domains.index("small")
    assert text_of(blocks, row) == "y|"
    assert blocks.input_ids[row, 2:].tolist() == [EOS] * 14


def test_each_block_begins_with_bos_if_the_tokenizer_adds_one():
    text = "abcdefgh"

    blocks = token_blocks([Document(text, "d")], byte_tokenizer(adds_bos=True), seq_len=4)

    assert sorted(text_of(blocks, row) for row in range(3)) == ["|abc", "|def", "|gh|"]


def test_max_tokens_is_shared_equally_and_what_is_left_goes_to_the_larger():
    documents = [Document("s" * 15, "small"), Document("m" * 400, "medium"), Document("l" * 4000, "large")]

    blocks = token_blocks(documents, byte_tokenizer(), seq_len=16, max_tokens=16 * 9 + 7)

    assert Counter(blocks.domains) == {"small": 1, "medium": 4, "large": 4}


def test_max_tokens_can_be_shared_by_size():
    documents = [Document("s" * 1000, "small"), Document("l" * 3000, "large")]

    blocks = token_blocks(
        documents, byte_tokenizer(), seq_len=16, max_tokens=16 * 20, domain_share="proportional"
    )

    assert Counter(blocks.domains) == {"small": 5, "large": 15}


def test_only_what_is_needed_is_tokenised(monkeypatch):
    monkeypatch.setattr("moekit.moe.data.TOKENIZER_BATCH", 1)
    tokenizer, seen = byte_tokenizer(), []
    original = type(tokenizer).__call__

    def counting(self, texts, **options):
        seen.extend([texts] if isinstance(texts, str) else texts)
        return original(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    token_blocks([Document("x" * 15, "d")] * 100, tokenizer, seq_len=16, max_tokens=64)

    assert len([text for text in seen if text]) == 4


def test_the_same_seed_gives_the_same_blocks_and_another_other_ones():
    documents = [Document(f"document number {n} of many", "d") for n in range(50)]

    def fingerprint(seed):
        return token_blocks(documents, byte_tokenizer(), seq_len=16, max_tokens=320, seed=seed).fingerprint

    assert fingerprint(0) == fingerprint(0)
    assert fingerprint(0) != fingerprint(1)


def test_the_fingerprint_sees_ids_mask_and_shape():
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long)
    other_mask = mask.clone()
    other_mask[0, -1] = 0
    variants = [
        TokenBlocks(ids, mask, ("a", "a")),
        TokenBlocks(ids + 1, mask, ("a", "a")),
        TokenBlocks(ids, other_mask, ("a", "a")),
        TokenBlocks(ids.view(3, 2), mask.view(3, 2), ("a", "a", "a")),
    ]

    assert len({blocks.fingerprint for blocks in variants}) == 4


def test_batches_give_every_block_once_and_in_order():
    blocks = TokenBlocks(torch.arange(14).view(7, 2), torch.ones(7, 2, dtype=torch.long), tuple("abcdefg"))

    batches = list(blocks.batches(3))

    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), blocks.input_ids)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(blocks.batches(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 64}, r"only 11 tokens, less than one sequence of seq_len=64; .*--seq-len 11 or less"),
        ({"seq_len": 1}, r"seq_len=1 is too short"),
        ({"seq_len": 8, "max_tokens": 7}, r"max_tokens=7 is less than one sequence of seq_len=8"),
        ({"seq_len": 8, "domain_share": "fair"}, r"domain_share='fair'"),
    ],
)
def test_too_little_is_refused_with_numbers(options, message):
    # The annotation of domain_share refuses a wrong word only while the tests run; users get the ValueError.
    function = getattr(token_blocks, "__wrapped__", token_blocks)

    with pytest.raises(ValueError, match=message):
        function([Document("x" * 10, "d")], byte_tokenizer(), **options)


def test_no_documents_and_no_eos_are_refused():
    with pytest.raises(ValueError, match="no documents"):
        token_blocks([], byte_tokenizer(), seq_len=8)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        token_blocks([Document("x" * 10, "d")], byte_tokenizer(eos_token=None), seq_len=8)


def blocks_of(counts: dict[str, int]) -> TokenBlocks:
    domains = tuple(domain for domain, count in counts.items() for _ in range(count))
    ids = torch.arange(len(domains)).unsqueeze(1).expand(-1, 4).contiguous()
    return TokenBlocks(ids, torch.ones_like(ids), domains)


@pytest.mark.parametrize("size", [{"held_out_tokens": 40}, {"held_out_fraction": 0.33}])
def test_a_split_shares_no_block_and_leaves_no_domain_out(size):
    blocks = blocks_of({"a": 20, "b": 8, "c": 2})

    kept, held_out = split_blocks(blocks, **size)

    rows = [set(part.input_ids[:, 0].tolist()) for part in (kept, held_out)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(30))
    assert set(kept.domains) == set(held_out.domains) == {"a", "b", "c"}
    assert len(held_out) == 10
    again = split_blocks(blocks, **size)[1]
    other = split_blocks(blocks, **size, seed=1)[1]
    assert held_out.fingerprint == again.fingerprint != other.fingerprint


def test_a_split_never_takes_the_last_block_of_a_domain():
    kept, held_out = split_blocks(blocks_of({"a": 2, "b": 1, "c": 1}), held_out_tokens=12)

    assert Counter(kept.domains) == {"a": 1, "b": 1, "c": 1}
    assert held_out.domains == ("a",)


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        ({"a": 4}, {}, "either held_out_tokens or held_out_fraction"),
        ({"a": 4}, {"held_out_tokens": 8, "held_out_fraction": 0.5}, "either held_out_tokens"),
        ({"a": 4}, {"held_out_tokens": 16}, "cannot hold out 4 of 4 blocks of 4 tokens"),
        ({"a": 4}, {"held_out_fraction": 0.0}, "cannot hold out 0 of 4"),
        ({"a": 1, "b": 1}, {"held_out_tokens": 4}, "every domain has a single block"),
    ],
)
def test_a_split_that_leaves_a_side_empty_is_refused(counts, size, message):
    with pytest.raises(ValueError, match=message):
        split_blocks(blocks_of(counts), **size)


@pytest.mark.parametrize("vocab_size", [258, 264, 516])
def test_a_tokenizer_fits_a_vocabulary_up_to_twice_its_size(vocab_size):
    check_tokenizer(byte_tokenizer(), Qwen3MoeConfig(vocab_size=vocab_size))


@pytest.mark.parametrize(
    ("options", "vocab_size", "message"),
    [
        ({}, 200, "has 258 tokens but the model's vocabulary only 200"),
        ({}, 1000, "258 tokens and the model's vocabulary 1000, more than twice"),
        ({"eos_token": "<new>"}, 258, "end-of-sequence id 258 is outside"),
        ({"eos_token": None}, 258, "no end-of-sequence token"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(options, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer(byte_tokenizer(**options), Qwen3MoeConfig(vocab_size=vocab_size))
