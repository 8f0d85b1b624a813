"""Rows with a label for each word: what `--task token-classification` reads."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("labels", "tags", "ner_tags", "pos_tags")
COLUMN_FILES = (".conll", ".iob", ".iob2", ".txt", ".tsv")
SEPARATOR = "-DOCSTART-"
"""A line of such files that is no word."""


@dataclass(frozen=True, slots=True)
class TaggedRow:
    """One sentence."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_tagged_rows(source: str) -> list[TaggedRow]:
    """Read a .jsonl or .parquet file, a file of columns, or a dataset.

    Files of columns (.conll, .tsv, .txt) have a word and, in the last column, its label on each line, and an
    empty line behind each sentence.

    Raises:
        ValueError: What cannot be read, with the reason.
    """
    path = Path(source).expanduser()
    if not path.exists() and (path.suffix in (*COLUMN_FILES, ".jsonl", ".parquet") or path.is_absolute()):
        raise ValueError(f"data file '{source}' does not exist")
    try:
        found = list(_rows(path, source))
    # The readers raise what they like at a damaged file; all mean the same here.
    except Exception as error:
        raise ValueError(f"data '{source}' cannot be read: {' '.join(str(error).split())}") from error
    if not found:
        raise ValueError(f"data '{source}' has no rows")
    return [_row(row, f"row {number} of '{source}'") for number, row in enumerate(found, 1)]


def _rows(path: Path, source: str) -> Iterable[Any]:
    if not path.is_file():
        return _dataset_rows(source)
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if path.suffix in COLUMN_FILES:
        return _column_rows(text)
    raise ValueError(f"it ends in '{path.suffix}', not in one of .jsonl, .parquet, {', '.join(COLUMN_FILES)}")


def _column_rows(text: str) -> Iterable[dict[str, list[str]]]:
    row: dict[str, list[str]] = {"tokens": [], "labels": []}
    for number, line in enumerate([*text.split("\n"), ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if columns and columns[0] == SEPARATOR:
            continue
        if columns and len(columns) < 2:
            raise ValueError(f"line {number} has one column; it needs a word and a label")
        if columns:
            row["tokens"].append(columns[0])
            row["labels"].append(columns[-1].strip())
        elif row["tokens"]:
            yield row
            row = {"tokens": [], "labels": []}


def _dataset_rows(name: str) -> Iterable[Any]:
    import datasets

    dataset_name, _, config = name.partition(":")
    data: Any = datasets.load_dataset(dataset_name, config or None, split="train")
    column = next((column for column in TAG_COLUMNS if column in data.features), None)
    feature = None if column is None else getattr(data.features[column], "feature", None)
    if not isinstance(feature, datasets.ClassLabel):
        return data
    return ({**row, column: [feature.int2str(tag) for tag in row[column]]} for row in data)


def _row(row: Any, where: str) -> TaggedRow:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with words and labels")
    words, tags = (
        next((row[key] for key in keys if key in row), None) for keys in (WORD_COLUMNS, TAG_COLUMNS)
    )
    if not isinstance(words, list) or not isinstance(tags, list):
        raise ValueError(
            f"{where} has the columns {', '.join(map(repr, row))}; it needs lists in one of "
            f"{', '.join(WORD_COLUMNS)} and in one of {', '.join(TAG_COLUMNS)}"
        )
    if len(words) != len(tags) or not words:
        raise ValueError(f"{where} has {len(words)} words and {len(tags)} labels; each word needs one")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"{where} has a word that is empty or no text")
    if wrong := [tag for tag in tags if isinstance(tag, bool | float) or not str(tag).strip() or tag is None]:
        raise ValueError(f"{where} has the label {wrong[0]!r}; it must be a name or a whole number")
    return TaggedRow(tuple(words), tuple(map(str, tags)))
