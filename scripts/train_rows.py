"""Rows with labels: what `moekit train --task classification` reads."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question", "question1", "premise")
PAIR_COLUMNS = ("text_pair", "sentence2", "question2", "hypothesis")
LABEL_COLUMN = "label"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ROW_FILES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One example."""

    label: str
    text: str = ""
    pair: str | None = None
    """Second text, as of a question about the first."""
    picture: Path | None = None
    """Instead of text."""


def read_labelled_rows(source: str) -> list[LabelledRow]:
    """Read a .jsonl, .csv, .tsv or .parquet file, a folder of class folders of pictures, or a dataset.

    Raises:
        ValueError: What cannot be read, with the reason; columns that are missing, with those that are there.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (rows := _pictures(path)):
        return rows
    return [_row(row, f"row {number} of '{source}'") for number, row in enumerate(read_rows(source), 1)]


def read_rows(source: str) -> list[Any]:
    """The rows of a .jsonl, .csv, .tsv or .parquet file, or of a dataset's ``train`` split.

    Raises:
        ValueError: What cannot be read, with the reason; there is no row.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in ROW_FILES:
        raise ValueError(
            f"data file '{source}' ends in '{path.suffix}', not in one of {', '.join(ROW_FILES)}"
        )
    if not path.exists() and (path.suffix in ROW_FILES or path.is_absolute() or source.startswith(".")):
        raise ValueError(f"data file or folder '{source}' does not exist")
    try:
        found = list(_file_rows(path) if path.is_file() else _dataset_rows(source))
    # The readers raise what they like at a damaged file; all mean the same here.
    except Exception as error:
        raise ValueError(f"data '{source}' cannot be read: {' '.join(str(error).split())}") from error
    if not found:
        raise ValueError(f"data '{source}' has no rows")
    return found


def _file_rows(path: Path) -> Iterable[Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))


def _dataset_rows(name: str) -> Iterable[Any]:
    import datasets

    dataset_name, _, config = name.partition(":")
    data: Any = datasets.load_dataset(dataset_name, config or None, split="train")
    feature = data.features.get(LABEL_COLUMN)
    if not isinstance(feature, datasets.ClassLabel):
        return data
    return ({**row, LABEL_COLUMN: feature.int2str(row[LABEL_COLUMN])} for row in data)


def _row(row: Any, where: str) -> LabelledRow:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with a text and a label")
    text, pair = (next((key for key in keys if key in row), None) for keys in (TEXT_COLUMNS, PAIR_COLUMNS))
    if text is None or LABEL_COLUMN not in row:
        raise ValueError(
            f"{where} has the columns {', '.join(map(repr, row))}; it needs {LABEL_COLUMN!r} and one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    label = row[LABEL_COLUMN]
    if label is None or isinstance(label, float | list | dict) or not str(label).strip():
        raise ValueError(f"{where} has the label {label!r}; it must be a name or a whole number")
    texts = [row[key] for key in (text, pair) if key is not None]
    if not all(isinstance(value, str) for value in texts):
        raise ValueError(f"{where} has a text that is no text: {texts!r:.80}")
    if not texts[0].strip():
        raise ValueError(f"{where} has an empty text; take the row out")
    return LabelledRow(str(label), texts[0], texts[1] if pair else None)


def _pictures(folder: Path) -> list[LabelledRow]:
    """A row for each picture of each class folder; none where it is another kind of folder."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [
        LabelledRow(label.name, picture=path)
        for label in classes
        for path in sorted(label.iterdir())
        if path.suffix.lower() in PICTURES
    ]


def label_names(found: Iterable[str]) -> tuple[str, ...]:
    """All different labels: numbers in their order, else names in that of the alphabet.

    Raises:
        ValueError: There is only one.
    """
    labels = set(found)
    if len(labels) < 2:
        raise ValueError(f"all rows have the label {', '.join(labels)!r}; there is nothing to tell apart")
    numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if numeric else str))
