"""Alignment of tokenizers against the texts that decoding each prefix gives."""

import random
from functools import cache
from itertools import pairwise, permutations

import pytest
import torch
from moekit.distill.losses import uld
from moekit.distill.token_alignment import align_text, same_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .students import DECODER

PLAIN = """The teacher reads the same text as the student, and says at each position how it goes on. Where the
two cut a word in different places, nothing can be compared; where a token of both begins, their answers can.
It's 3.5 times as much as they'd need.

  Indented lines, too: some are short, and others are longer.
"""
STRANGE = ["naïve", "e\u0301", "你好世界", "😀", "👩\u200d👩\u200d👧", "ﬁ", "Ωμέγα", "don't", "#1", "x你y😀"]
STRANGE += ["\t", "   ", "\n\n"]
EVERYTHING = PLAIN + " ".join(STRANGE)
EOS = {"few": "<|end|>", "many": "</s>", "fallback": "<eos>", "unigram": "[EOS]", "wordpiece": "[SEP]"}
BYTE_LEVEL = ["few", "many"]
EXACT = [*BYTE_LEVEL, "fallback"]


def bytes_in(model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(eos="<end>", merges=(), numbering=1, **parts):
    """One token for each byte, then the merges, then eos; or numbered from behind."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), eos][::numbering]
    tokenizer = bytes_in(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def trained(tokenizer, trainer, eos, vocab_size, special=(), text=EVERYTHING, **options):
    build = getattr(trainers, trainer)
    options |= {"special_tokens": [eos, *special], "show_progress": False}
    tokenizer.train_from_iterator([text] * 3, build(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def byte_bpe(eos, vocab_size):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(bytes_in(models.BPE()), "BpeTrainer", eos, vocab_size, initial_alphabet=alphabet)


def byte_fallback(eos):
    """As Llama 2: a space before each text, and bytes for characters that it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(tokenizer, "BpeTrainer", eos, 400, special, text=PLAIN)


def unigram(eos):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, "UnigramTrainer", eos, 200, ["<unk>"], unk_token="<unk>")


def wordpiece(eos):
    """Loses spaces. Knows every character, also those of `<unk>`, and of its `##` where a cut bares it."""
    characters = sorted(set(EVERYTHING + "<unk>#"))
    names = [eos, "[UNK]", *characters, *("##" + c for c in characters), "teacher", "student", "##ent", "##s"]
    names = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@cache
def tokenizer_named(name):
    eos = EOS[name]
    sizes = {"few": 290, "many": 600}
    if name in sizes:
        return byte_bpe(eos, sizes[name])
    return {"fallback": byte_fallback, "unigram": unigram, "wordpiece": wordpiece}[name](eos)


def stream_of(documents, tokenizer):
    """As `token_blocks` joins them."""
    encoded = tokenizer(documents, add_special_tokens=False).input_ids
    return torch.tensor([i for ids in encoded for i in [*ids, tokenizer.eos_token_id]])


def random_documents(rng):
    words = [*PLAIN.split(" "), *STRANGE * 2]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 12))) for _ in range(5)]


def random_block(rng, tokenizer):
    ids = stream_of(random_documents(rng), tokenizer)
    begin, end = sorted(rng.sample(range(len(ids) + 1), 2))
    return ids[begin:end]


def text_of(ids, tokenizer):
    """Documents with a line between."""
    documents = [[]]
    for i in ids.tolist():
        documents.append([]) if i == tokenizer.eos_token_id else documents[-1].append(i)
    return "|".join(tokenizer.decode(d, skip_special_tokens=False) for d in documents)


def prefix_texts(ids, tokenizer):
    """What has been read at each position; nothing to compare within a character, if the document goes on."""
    texts = [text_of(ids[:end], tokenizer) for end in range(1, len(ids) + 1)]
    ends = [*(ids[1:] == tokenizer.eos_token_id).tolist(), False]
    both = zip(texts, ends, strict=False)
    return [None if text.endswith("\ufffd") and not end else text.lstrip("\ufffd") for text, end in both]


def paired_texts(block, student, teacher):
    """What both have read at each pair of positions."""
    aligned = align_text(block, student, teacher)
    assert aligned.teacher_positions.shape == block.shape
    ours, theirs = prefix_texts(block, student), prefix_texts(aligned.teacher_ids, teacher)
    pairs = [(s, u) for s, u in enumerate(aligned.teacher_positions.tolist()) if u != -1]
    assert all(before < after for (_, before), (_, after) in pairwise(pairs))
    assert None not in {text for s, u in pairs for text in (ours[s], theirs[u])}
    return [(ours[s], theirs[u]) for s, u in pairs]


def test_positions_worked_by_hand():
    student = byte_level(merges=[("a", "b"), ("Ġ", "c")])
    across_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    teacher = byte_level("</s>", [("b", "Ġ"), ("c", "d"), ("e", "f")], pre_tokenizer=across_words)
    block = stream_of(["ab cdef", "f"], student)
    assert student.convert_ids_to_tokens(block) == ["ab", "Ġc", "d", "e", "f", "<end>", "f", "<end>"]
    aligned = align_text(block, student, teacher)
    tokens = teacher.convert_ids_to_tokens(aligned.teacher_ids)
    assert tokens == ["a", "bĠ", "cd", "ef", "</s>", "f", "</s>"]
    #     after:                                      ab  c   d  e   f  end f  end
    assert aligned.teacher_positions.tolist() == [-1, -1, 2, -1, 3, 4, 5, 6]


@pytest.mark.parametrize("begins", [0, 1])
def test_the_teachers_text_begins_as_its_tokenizer_wants(begins):
    """Position 0 of one that adds a token predicts the first of the text; nobody does in the other."""
    adds_eos = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    adding = byte_level(post_processor=adds_eos)
    adding.bos_token = "<end>"
    plain = byte_level("</s>")
    block = stream_of(["ab", "c"], plain)
    with_bos = torch.cat([torch.tensor([256]), stream_of(["ab", "c"], adding)])
    aligned = align_text(block, plain, adding)
    assert torch.equal(aligned.teacher_ids, with_bos)
    assert aligned.teacher_positions.tolist() == [1, 2, 3, 4, 5]
    aligned = align_text(with_bos, adding, plain)
    assert torch.equal(aligned.teacher_ids, block)
    assert aligned.teacher_positions.tolist() == [-1, 0, 1, 2, 3, 4]
    aligned = align_text(with_bos[1 - begins :], adding, adding)
    assert torch.equal(aligned.teacher_ids, with_bos)
    assert aligned.teacher_positions.tolist() == list(range(1 - begins, 6))


@pytest.mark.parametrize("name", EOS)
def test_the_same_tokenizer_gives_the_identity(name):
    tokenizer = tokenizer_named(name)
    block = stream_of([PLAIN, "student", "你好"], tokenizer)
    aligned = align_text(block, tokenizer, tokenizer)
    assert torch.equal(aligned.teacher_ids, block)
    whole = [s if text is not None else -1 for s, text in enumerate(prefix_texts(block, tokenizer))]
    assert aligned.teacher_positions.tolist() == whole
    assert (-1 in whole) == (name in ("few", "fallback"))  # who spell the characters at the end


@pytest.mark.parametrize(("student", "teacher"), [*permutations(EXACT, 2)])
def test_both_have_read_the_same_text(student, teacher):
    rng = random.Random(0)
    student, teacher = tokenizer_named(student), tokenizer_named(teacher)
    num_pairs = 0
    for _ in range(60):
        pairs = paired_texts(random_block(rng, student), student, teacher)
        assert all(ours == theirs for ours, theirs in pairs)
        num_pairs += len(pairs)
    assert num_pairs > 500


@pytest.mark.parametrize(("student", "teacher"), [*permutations(BYTE_LEVEL, 2)])
def test_no_pair_is_missed(student, teacher):
    rng = random.Random(1)
    student, teacher = tokenizer_named(student), tokenizer_named(teacher)
    for _ in range(40):
        block = random_block(rng, student)
        aligned = align_text(block, student, teacher)
        theirs = {text: u for u, text in enumerate(prefix_texts(aligned.teacher_ids, teacher))} | {None: -1}
        slow = [theirs.get(text, -1) for text in prefix_texts(block, student)]
        assert aligned.teacher_positions.tolist() == slow


@pytest.mark.parametrize("student", EOS)
@pytest.mark.parametrize("teacher", ["unigram", "wordpiece"])
def test_what_a_tokenizer_loses_is_not_compared(student, teacher):
    rng = random.Random(2)
    student, teacher = tokenizer_named(student), tokenizer_named(teacher)
    num_pairs = 0
    for _ in range(30):
        pairs = paired_texts(random_block(rng, student), student, teacher)
        assert all("".join(ours.split()) == "".join(theirs.split()) for ours, theirs in pairs)
        num_pairs += len(pairs)
    assert num_pairs > 200


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_teacher_that_sees_no_capitals(trim_offsets):
    student = tokenizer_named("many")
    teacher = byte_level(
        merges=[("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")],
        normalizer=normalizers.Lowercase(),
        post_processor=processors.ByteLevel(trim_offsets=trim_offsets),
    )
    block = stream_of([PLAIN + "A  B 你好 C"], student)
    pairs = paired_texts(block, student, teacher)
    assert all(ours.lower() == theirs for ours, theirs in pairs)
    assert len(pairs) > 0.9 * len(block)


@pytest.mark.parametrize(
    ("student", "teacher", "least"),
    [("many", "few", 0.99), ("few", "many", 0.99), ("many", "unigram", 0.9), ("wordpiece", "many", 0.9)],
)
def test_most_positions_of_ordinary_text_have_a_partner(student, teacher, least):
    student, teacher = tokenizer_named(student), tokenizer_named(teacher)
    aligned = align_text(stream_of([PLAIN] * 3, student), student, teacher)
    num_pairs = int((aligned.teacher_positions != -1).sum())
    assert num_pairs > least * min(len(aligned.teacher_positions), len(aligned.teacher_ids))


@pytest.mark.parametrize("student", BYTE_LEVEL)
@pytest.mark.parametrize("teacher", EXACT)
def test_any_tokens_at_all_can_be_read(student, teacher):
    """What a student that knows nothing yet would write: mostly broken characters."""
    student, teacher = tokenizer_named(student), tokenizer_named(teacher)
    block = torch.randint(len(student), (300,))
    pairs = paired_texts(block, student, teacher)
    assert all(ours == theirs for ours, theirs in pairs)
    assert len(pairs) > 50


@pytest.mark.parametrize("student", EXACT)
@pytest.mark.parametrize("broken", ["marks", "bytes"])
def test_broken_characters_spoil_nothing_behind_them(student, broken):
    student, teacher = tokenizer_named(student), tokenizer_named("few")
    before = stream_of(["A" + "\ufffd" * 50], student)[:-1]
    if broken == "bytes":  # letters, and each time the last byte of a character without the others
        letters, inside = student(["ba", "你"], add_special_tokens=False).input_ids
        before = torch.tensor([*letters, inside[-1]] * 3)
    document = torch.cat([torch.tensor([student.eos_token_id]), stream_of([PLAIN], student)])
    alone = align_text(document, student, teacher)
    aligned = align_text(torch.cat([before, document]), student, teacher)
    begin = len(aligned.teacher_ids) - len(alone.teacher_ids)
    assert begin > 0
    assert aligned.teacher_ids[begin:].equal(alone.teacher_ids)
    shifted = torch.where(alone.teacher_positions == -1, -1, alone.teacher_positions + begin)
    assert aligned.teacher_positions[len(before) :].equal(shifted)


def test_what_a_decoder_takes_back_stays():
    """One with byte fallback no longer writes a character once broken bytes follow it."""
    student, teacher = tokenizer_named("fallback"), byte_level()
    character = student("你", add_special_tokens=False).input_ids[-3:]
    block = torch.tensor([*character, character[0], *student("ba", add_special_tokens=False).input_ids])
    aligned = align_text(block, student, teacher)
    assert teacher.decode(aligned.teacher_ids) == "你\ufffd ba"
    assert aligned.teacher_positions[2] == 2
    assert aligned.teacher_positions[-1] == len(aligned.teacher_ids) - 1


def test_the_end_of_a_document_is_the_teachers_own():
    student, teacher = tokenizer_named("many"), tokenizer_named("few")
    block = stream_of(["One.", "", "Two."], student)
    aligned = align_text(block[:-1], student, teacher)
    assert aligned.teacher_ids.equal(stream_of(["One.", "", "Two."], teacher)[:-1])
    empty = align_text(block[:0], student, teacher)
    assert len(empty.teacher_ids) == len(empty.teacher_positions) == 0


def test_other_special_tokens_are_read_by_their_names():
    student, teacher = byte_level(), byte_level("</s>")
    student.add_special_tokens({"additional_special_tokens": ["<user>"]})
    block = torch.tensor(student("a<user>b").input_ids)
    aligned = align_text(block, student, teacher)
    assert teacher.decode(aligned.teacher_ids) == "a<user>b"
    assert aligned.teacher_positions.tolist() == [0, 6, 7]


@pytest.mark.parametrize("lossy", [False, True])
def test_a_shorter_teacher_has_fewer_partners(lossy):
    student = tokenizer_named("many")
    teacher = byte_level(**{"normalizer": normalizers.Lowercase()} if lossy else {})
    block = stream_of(["The teacher: 你好!"], student)
    whole = align_text(block, student, teacher)
    for length in range(1, len(whole.teacher_ids) + 1):
        cut = align_text(block, student, teacher, max_length=length)
        assert cut.teacher_ids.equal(whole.teacher_ids[:length])
        within = whole.teacher_positions < length
        assert cut.teacher_positions.equal(torch.where(within, whole.teacher_positions, -1))


def test_what_cannot_be_aligned_is_refused():
    block, fast = torch.tensor([1, 2]), byte_level()
    with pytest.raises(ValueError, match="student's tokenizer ByT5Tokenizer is not a fast one"):
        align_text(block, ByT5Tokenizer(), fast)
    with pytest.raises(ValueError, match="teacher's tokenizer ByT5Tokenizer is not a fast one"):
        align_text(block, fast, ByT5Tokenizer())
    with pytest.raises(ValueError, match="max_length=0"):
        align_text(block, fast, fast, max_length=0)
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        align_text(block, fast, endless)


def test_which_tokenizers_are_the_same():
    merges = [("a", "b")]
    one = byte_level(merges=merges)
    padded = byte_level(merges=merges, post_processor=processors.ByteLevel(trim_offsets=False))
    padded.backend_tokenizer.enable_padding(length=7)
    padded.backend_tokenizer.enable_truncation(7)
    one.add_tokens([AddedToken("<user>", normalized=False)])
    padded.add_special_tokens({"additional_special_tokens": ["<user>"]})
    assert same_tokenizer(one, one)
    assert same_tokenizer(one, padded)
    assert same_tokenizer(ByT5Tokenizer(), ByT5Tokenizer())
    one = byte_level(merges=merges)
    others = [
        byte_level(merges=[("a", "c")]),
        byte_level("</s>", merges),
        byte_level(merges=merges, numbering=-1),
        byte_level(merges=merges, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level(merges=merges, normalizer=normalizers.NFC()),
        ByT5Tokenizer(),
    ]
    assert not any(same_tokenizer(one, other) for other in others)


@pytest.mark.parametrize("numbering", [1, -1])
def test_uld_of_a_teacher_with_the_students_weights_is_zero(numbering):
    """Also where the teacher's tokens merely carry other numbers and its documents another end."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
    student_tokenizer = byte_level(merges=merges)
    teacher_tokenizer = byte_level("<end>" if numbering == 1 else "</s>", merges, numbering)
    assert same_tokenizer(student_tokenizer, teacher_tokenizer) == (numbering == 1)
    sizes = DECODER | {"vocab_size": len(student_tokenizer), "max_position_embeddings": 512}
    student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes | {"pad_token_id": None})).eval() for _ in "ab")
    weights = student.state_dict()
    if numbering == -1:
        weights |= {name: weights[name].flip(0) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    teacher.load_state_dict(weights)

    block = stream_of([PLAIN, "in the end"], student_tokenizer)
    aligned = align_text(block, student_tokenizer, teacher_tokenizer)
    assert (aligned.teacher_ids == block).all() == (numbering == 1)
    assert aligned.teacher_positions.equal(torch.arange(len(block)))
    ours = student(block[None]).logits[0]
    theirs = teacher(aligned.teacher_ids[None]).logits[0, aligned.teacher_positions]
    torch.testing.assert_close(uld(ours, theirs), torch.zeros(len(block)), rtol=0, atol=1e-5)
    assert uld(ours[1:], theirs[:-1]).mean() > 1e-3
