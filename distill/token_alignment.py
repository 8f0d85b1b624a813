"""Two tokenizers, one text: which positions of the teacher belong to which of the student."""

# S tokens of the student, U of the teacher

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..moe.data import block_prefix

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""
LONGEST_WAIT = 16
"""Tokens. What is no text by then will not become any."""
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class AlignedText:
    """The teacher's tokens of a student's text, and which positions belong together."""

    teacher_ids: Int[Tensor, " U"]
    """The teacher's tokens of the same text."""
    teacher_positions: Int[Tensor, " S"]
    """For each of the student's positions the teacher's that belongs to it; -1 where there is none."""


def align_text(
    student_ids: Int[Tensor, " S"],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
) -> AlignedText:
    """Give the teacher the text of a student's block, and find the positions at which both predict the same.

    Student position s and teacher position u belong together when the tokens s + 1 and u + 1 begin at the
    same character: both have read the same text and say how it goes on. The last positions do when both have
    read all of it. Each position has one partner at most, and partners rise together. Takes time linear in S.

    The student's end-of-sequence token becomes the teacher's own, and so does its beginning-of-sequence token
    where the teacher's tokenizer adds one; the teacher's text begins with what its tokenizer adds, whether or
    not the student's does. Any other special token is read as the text of its name. Half a character at the
    beginning, where a block was cut, is not given to the teacher.

    Where the teacher's tokenizer loses something of the text (case, spaces, unknown characters), its tokens
    begin where its offsets say, and spaces that it skips count to the token behind them.

    Args:
        student_ids: One block without padding; it may begin and end anywhere, and hold several documents.
        student_tokenizer: Of these ids.
        teacher_tokenizer: Any other, or the same.
        max_length: At most this many tokens for the teacher.

    Returns:
        Both on the device of ``student_ids``, int64.

    Raises:
        ValueError: A tokenizer is not a fast one, the teacher's has no end-of-sequence token for the
            student's, or ``max_length`` is below 1.
    """
    _check(student_tokenizer, teacher_tokenizer, max_length)
    bos, eos = _special_ids(student_tokenizer)
    ids, prefix = student_ids.tolist(), block_prefix(teacher_tokenizer)
    begin = int(ids[:1] == [bos] and (bos != eos or bool(block_prefix(student_tokenizer))))
    student_starts, teacher_starts, teacher_ids = [NOWHERE] * begin, [NOWHERE] * len(prefix), [*prefix]
    length = 0
    student_end = 0
    for part in _parts(ids[begin:], student_tokenizer, teacher_tokenizer):
        student_starts += _shifted(part.student_starts, length)
        teacher_starts += _shifted(part.teacher_starts, length)
        teacher_ids += part.teacher_ids
        length += part.length
        student_end = length if part.is_whole else NOWHERE
    # A position is where its next token begins.
    positions = _pair([*student_starts, student_end][1:], [*teacher_starts, length][1:][:max_length])
    as_tensor = partial(torch.tensor, dtype=torch.long, device=student_ids.device)
    return AlignedText(as_tensor(teacher_ids[:max_length]), as_tensor(positions))


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers cut every text alike and number the tokens alike, special tokens included.

    What they add around a text, their padding and truncation, how they decode, and which of their tokens they
    call the end of a sequence may differ. Slow tokenizers are compared by their vocabularies alone.
    """
    if a is b:
        return True
    if a.get_vocab() != b.get_vocab():
        return False
    return not (a.is_fast and b.is_fast) or _cutting(a) == _cutting(b)


def _cutting(tokenizer: Any) -> dict[str, Any]:
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for added in settings["added_tokens"]:
        added.pop("special", None)  # says what may be left out of a decoded text
    return {name: settings[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


def _check(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, max_length: int | None
) -> None:
    for role, tokenizer in (("student", student), ("teacher", teacher)):
        if not tokenizer.is_fast:
            raise ValueError(
                f"the {role}'s tokenizer {type(tokenizer).__name__} is not a fast one, which aligning two "
                "tokenizers needs; load it with AutoTokenizer, or take a teacher with the student's tokenizer"
            )
    if _special_ids(student)[1] is not None and _special_ids(teacher)[1] is None:
        raise ValueError(
            "the teacher's tokenizer has no end-of-sequence token, which ends each document; set "
            "`tokenizer.eos_token`"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} is not a positive number of the teacher's tokens")


def _special_ids(tokenizer: Any) -> tuple[Any, Any]:
    """Beginning and end of a sequence."""
    return tokenizer.bos_token_id, tokenizer.eos_token_id


@dataclass(frozen=True, slots=True)
class _Part:
    """A document or a marker between two."""

    length: int
    """Characters."""
    student_starts: list[int]
    """The character at which each token begins."""
    teacher_ids: list[int]
    teacher_starts: list[int]
    is_whole: bool = True
    """Whether the student's last token ends with a character."""


def _parts(ids: list[int], student: Any, teacher: Any) -> Iterator[_Part]:
    bos, eos = _special_ids(student)
    # In this order: where one token is both, it ends the document before.
    markers = {bos: block_prefix(teacher), eos: [_special_ids(teacher)[1]]}
    is_first = True
    for is_marker, run in groupby(ids, key=markers.__contains__):
        if is_marker:  # counts as a character even where the teacher has none, so that no two share a place
            yield from (_Part(1, [0], markers[i], [0] * len(markers[i])) for i in run)
        else:
            text, starts = _read(list(run), student)
            if is_first:
                text, starts = _without_half_character(text, starts)
            yield _Part(len(text), starts[:-1], *_encode(text, teacher), starts[-1] != NOWHERE)
        is_first = False


def _read(ids: list[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The text, and where each token begins in it; behind those its end. -1 within a character.

    A piece of text is written once it is whole. Decoders treat the first token of all specially (many drop
    its space), hence each piece is decoded with the one before it.
    """
    decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    pieces: list[str] = []
    starts = [0]
    length = context = written = 0  # ids[context:written] is the last piece, and ids[written:] waits
    known = ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[context:end])
        is_whole = not text.endswith(REPLACEMENT)
        if is_whole or end - written == LONGEST_WAIT or end == len(ids):
            # Broken bytes make some decoders take back what they had written.
            piece = text[len(known) :] if text.startswith(known) else decode(ids[written:end])
            pieces.append(piece)
            length += len(piece)
            context, written = written, end
            known = decode(ids[context:written])
        starts.append(length if is_whole else NOWHERE)
    return "".join(pieces), starts


def _without_half_character(text: str, starts: list[int]) -> tuple[str, list[int]]:
    """Drop what a cut through a character left at the beginning."""
    kept = text.lstrip(REPLACEMENT)
    dropped = len(text) - len(kept)
    return kept, [start - dropped if start >= dropped else NOWHERE for start in starts]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of a text, and where each begins."""
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    # Not by offsets where it can be helped: those of some byte-level tokenizers leave out spaces, and others
    # give a space that they add before the text the place of its first character.
    decoded, starts = _read(ids, tokenizer)
    if decoded == text:
        return ids, starts[:-1]
    starts, length = [], 0
    for begin, end in encoded["offset_mapping"]:
        starts.append(length if begin >= length else NOWHERE)
        length = max(length, end)
    return ids, starts


def _shifted(starts: list[int], by: int) -> list[int]:
    return [start + by if start != NOWHERE else NOWHERE for start in starts]


def _pair(student_places: list[int], teacher_places: list[int]) -> list[int]:
    """For each of the student's places the position at which the teacher has it."""
    positions: dict[int, list[int]] = {}
    for position, place in enumerate(teacher_places):
        if place != NOWHERE:
            positions.setdefault(place, []).append(position)
    paired: list[int] = []
    # From behind: of several at one place the last predicts a character, those before it nothing visible.
    for place in reversed(student_places):
        left = positions.get(place)
        paired.append(left.pop() if left else NOWHERE)
    return paired[::-1]
