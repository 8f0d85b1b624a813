"""The examples that a model is trained and evaluated on, the same on every process."""

# N examples, S positions

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from ..moe import check_tokenizer, load_documents, split_blocks, token_blocks
from ..moe.data import TokenBlocks
from .calibrate import check_token_ids, sequence_length
from .options import TrainingOptions
from .tagged_rows import TaggedRow, read_tagged_rows
from .train_rows import LabelledRow, label_names, read_labelled_rows

IGNORED = -100
"""Label of a position that is not learned."""
CALIBRATION_EXAMPLES = 64
"""Examples that routers are centred and neurons are grouped on."""


class BlockRows(Dataset[dict[str, Tensor]]):
    """Token blocks with labels: every token but padding is learned."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_S, mask_S = self.blocks.input_ids[index], self.blocks.attention_mask[index]
        labels_S = ids_S.masked_fill(mask_S == 0, IGNORED)
        return {"input_ids": ids_S, "attention_mask": mask_S, "labels": labels_S}


class ClassRows(Dataset[dict[str, Any]]):
    """Rows as a model reads them, tokenised or loaded when they are asked for."""

    def __init__(self, rows: Sequence[Any], read: Callable[[Any], dict[str, Any]]) -> None:
        self.rows = rows
        self.read = read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.rows[index])


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Everything that training needs to know of the data."""

    train: Any
    held_out: Any
    collator: Any
    train_fingerprint: str
    """Changes with the content or order of the rows to train on: tokens, or the texts and pictures of which
    a teacher makes its own."""
    fingerprint: str
    """Changes when any example does as the model reads it."""
    unit: str
    """What speed is counted in: tokens or pictures."""

    def calibration_batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """A few batches to train on, without labels."""
        count = min(CALIBRATION_EXAMPLES, len(self.train))
        batches = []
        for start in range(0, count, batch_size):
            rows = [self.train[index] for index in range(start, min(start + batch_size, count))]
            batch = self.collator(rows)
            batches.append({key: value for key, value in batch.items() if key != "labels"})
        return batches

    def speed_batch(self, batch_size: int) -> tuple[dict[str, Tensor], int]:
        """A batch without labels, and how much of `unit` it holds."""
        rows = [self.held_out[index % len(self.held_out)] for index in range(batch_size)]
        batch = {key: value for key, value in self.collator(rows).items() if key != "labels"}
        return batch, int(batch["attention_mask"].sum()) if self.unit == "tokens" else len(rows)


def read_classes(options: TrainingOptions) -> tuple[list[LabelledRow], list[LabelledRow], tuple[str, ...]]:
    """Rows to train on, rows to evaluate on, and the names of the labels.

    Raises:
        ValueError: The data cannot be read, or has labels in the one part that the other lacks.
    """
    train, held_out, labels = _read_parts(options, read_labelled_rows, lambda row: (row.label,))
    if (held_out[0].picture is None) != (train[0].picture is None):
        raise ValueError("one of --data and --eval-data has pictures and the other text")
    return train, held_out, labels


def read_tags(options: TrainingOptions) -> tuple[list[TaggedRow], list[TaggedRow], tuple[str, ...]]:
    """The same for rows with a label for each word."""
    return _read_parts(options, read_tagged_rows, lambda row: row.tags)


def _read_parts(
    options: TrainingOptions, read: Callable[[str], list[Any]], labels_of: Callable[[Any], Sequence[str]]
) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    assert options.data is not None
    rows = read(options.data)
    labels = label_names(label for row in rows for label in labels_of(row))
    if options.eval_data is not None:
        held_out = read(options.eval_data)
        if unknown := sorted({label for row in held_out for label in labels_of(row)} - set(labels)):
            raise ValueError(f"--eval-data has the labels {unknown}, which --data has not: {list(labels)}")
        return rows, held_out, labels
    order = random.Random(options.seed).sample(rows, len(rows))
    count = max(1, round(options.eval_share * len(rows)))
    if count >= len(rows):
        raise ValueError(f"cannot hold out {count} of {len(rows)} rows; give more data, or --eval-data")
    return order[count:], order[:count], labels


def text_examples(options: TrainingOptions, tokenizer: Any, model: PreTrainedModel) -> Examples:
    """Blocks of text for a language model.

    Raises:
        ValueError: Too little text, or a tokenizer that is not the model's.
    """
    check_tokenizer(tokenizer, model.config)
    seq_len = sequence_length(options.seq_len, model.config)

    def read(source: str) -> TokenBlocks:
        blocks = token_blocks(load_documents(source), tokenizer, seq_len=seq_len, seed=options.seed)
        check_token_ids(blocks, model)
        return blocks

    assert options.data is not None
    train = read(options.data)
    if options.eval_data is None:
        train, held_out = split_blocks(train, held_out_fraction=options.eval_share, seed=options.seed)
    else:
        held_out = read(options.eval_data)
    return Examples(
        train=BlockRows(train),
        held_out=BlockRows(held_out),
        collator=default_data_collator,
        train_fingerprint=train.fingerprint,
        fingerprint=f"{train.fingerprint} {held_out.fingerprint}",
        unit="tokens",
    )


def class_examples(
    options: TrainingOptions,
    train: Sequence[LabelledRow],
    held_out: Sequence[LabelledRow],
    labels: Sequence[str],
    processor: Any,
    model: PreTrainedModel,
) -> Examples:
    """Rows for a classifier of texts or pictures; every picture is read once, for the fingerprint."""
    number_of = {label: number for number, label in enumerate(labels)}
    pictures = train[0].picture is not None
    max_length = None if pictures else sequence_length(options.seq_len, model.config)

    padding = DataCollatorWithPadding(processor) if not pictures else None

    def read_text(row: LabelledRow) -> dict[str, Any]:
        tokens = processor(row.text, row.pair, truncation=True, max_length=max_length)
        return {**known_inputs(tokens, type(model)), "labels": number_of[row.label]}

    def read_pixels(row: LabelledRow) -> dict[str, Any]:
        return {"pixel_values": read_picture(processor, row), "labels": number_of[row.label]}

    read = read_pixels if pictures else read_text
    own, other = (_fingerprint(map(_content, rows)) for rows in (train, held_out))
    reader = _fingerprint([max_length, list(labels), processor_fingerprint(processor)])
    return Examples(
        train=ClassRows(train, read),
        held_out=ClassRows(held_out, read),
        collator=default_data_collator if padding is None else lambda rows: dict(padding(rows)),
        train_fingerprint=own,
        fingerprint=f"{own} {other} {reader}",
        unit="pictures" if pictures else "tokens",
    )


def tag_examples(
    options: TrainingOptions,
    train: Sequence[TaggedRow],
    held_out: Sequence[TaggedRow],
    labels: Sequence[str],
    processor: Any,
    model: PreTrainedModel,
) -> Examples:
    """Rows for a classifier of tokens: a word's first token has its label, the others have none.

    Every row is tokenised once more than it is used, for the fingerprint.

    Raises:
        ValueError: The tokenizer cannot tell which token belongs to which word.
    """
    if not processor.is_fast:
        raise ValueError(
            f"the tokenizer {type(processor).__name__} is not a fast one, which --task token-classification "
            "needs to tell the words apart; name one with --tokenizer"
        )
    number_of = {label: number for number, label in enumerate(labels)}
    max_length = sequence_length(options.seq_len, model.config)
    padding = DataCollatorForTokenClassification(processor)

    def read(row: TaggedRow) -> dict[str, Any]:
        tokens = processor(list(row.words), is_split_into_words=True, truncation=True, max_length=max_length)
        words = tokens.word_ids()
        found = [
            IGNORED if word in (None, before) else number_of[row.tags[word]]
            for before, word in zip([None, *words], words, strict=False)
        ]
        return {**known_inputs(tokens, type(model)), "labels": found}

    own, other = (_fingerprint(map(read, rows)) for rows in (train, held_out))
    return Examples(
        train=ClassRows(train, read),
        held_out=ClassRows(held_out, read),
        collator=lambda rows: dict(padding(rows)),
        train_fingerprint=own,
        fingerprint=f"{own} {other}",
        unit="tokens",
    )


def _content(row: LabelledRow) -> list[str | None]:
    """All of a row but where its picture is."""
    if row.picture is None:
        return [row.label, row.text, row.pair]
    with row.picture.open("rb") as file:
        return [row.label, hashlib.file_digest(file, "sha256").hexdigest()]


def _fingerprint(facts: Iterable[Any]) -> str:
    """SHA-256 of JSON values in their order."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """Of a tokenizer or image processor: what it makes of one example, wherever it was loaded from."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return _fingerprint([repr(processor)])
    # Padding and truncation are what the last call has left behind.
    settings = {**json.loads(backend.to_str()), "padding": None, "truncation": processor.truncation_side}
    return _fingerprint([settings])


def known_inputs(tokens: Mapping[str, Any], kind: type[PreTrainedModel]) -> dict[str, Any]:
    """Of what a tokenizer gives, that which models of a class take."""
    known = _parameters(kind)
    return {key: value for key, value in tokens.items() if key in known}


@cache
def _parameters(kind: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(signature(kind.forward).parameters)


def read_picture(processor: Any, row: LabelledRow) -> Tensor:
    """The pixels of a row as an image processor makes them."""
    from PIL import Image

    with Image.open(str(row.picture)) as picture:
        return processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def row_metrics(logits: Any, labels: Tensor, *, shift: bool) -> Tensor:
    """``[N, 3]``: each row's sum of -log p(label) in nats, number of labels, and number of right answers.

    Args:
        logits: ``[N, S, V]``, or ``[N, C]`` for classes; or a tuple that begins with them.
        labels: ``[N, S]`` or ``[N]``.
        shift: Whether position s predicts label s + 1.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = (logits, labels) if labels.ndim == 2 else (logits[:, None], labels[:, None])
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    right = (logits.argmax(-1) == labels).sum(1)
    return torch.stack([loss.sum(1), (labels != IGNORED).sum(1), right], dim=1).float()
