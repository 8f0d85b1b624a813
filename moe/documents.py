"""Read the documents of a file, a folder or a dataset, with the domain of each."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the domain it belongs to."""

    text: str
    domain: str


def load_documents(
    source: str | Path,
    *,
    split: str = "train",
    text_column: str = "text",
    domain_column: str = "domain",
    limit: int | None = None,
) -> list[Document]:
    """Read the documents of a file, a folder or a dataset.

    * ``.txt`` and ``.md`` are one document each (line breaks and paragraphs are part of the text), a folder
      of nothing else is one document and one domain per file;
    * ``.jsonl``, ``.json`` (a list of objects, or JSON lines) and ``.parquet`` give one document per row;
    * any other folder, or a name, is read by the `datasets` library; ``NAME:CONFIG`` picks a configuration.

    All but parquet may end in ``.gz``. Rows whose text is empty or null are left out.

    Args:
        source: What to read.
        split: Split of a dataset; files have none.
        text_column: Column or key that holds the text.
        domain_column: Column or key that holds the domain; where the default is absent, the name of the
            source, without folders and endings, is the domain of all rows.
        limit: At most this many documents, the first ones.

    Raises:
        ValueError: What cannot be read, with the reason; a column that is not there, with those that are;
            no text at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not a positive number of documents")
    path = Path(source)
    if path.is_dir() and (texts := _text_files(path)):
        return [document for text in texts for document in load_documents(text)][:limit]
    kind = _file_kind(source)
    if kind == "text":
        rows = iter([{text_column: "".join(_lines(path))}])
        domain_column = "domain"
    elif kind == "parquet":
        rows = _parquet_rows(path)
    elif kind is not None:
        rows = _json_rows(path, kind)
    else:
        rows = _dataset_rows(str(source), split, streaming=limit is not None)
    default_domain = path.name.split(":" if kind is None else ".")[0] or path.name
    documents = []
    for row_number, row in enumerate(rows, 1):
        where = f"row {row_number} of '{source}'"
        document = _document(row, where, text_column, domain_column, default_domain)
        if document is not None:
            documents.append(document)
        if len(documents) == limit:
            break
    if not documents:
        raise ValueError(
            f"'{source}' holds no text: it is empty, or column '{text_column}' is empty in every row"
        )
    return documents


def _file_kind(source: str | Path) -> str | None:
    """How to read `source` as a file; None when it is a dataset's folder or name."""
    path = Path(source)
    kind = FILE_KINDS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)
    if path.is_file() and kind is None:
        raise ValueError(
            f"data file '{path}' ends in '{path.suffix}', not in one of {', '.join(FILE_KINDS)}, or .gz"
        )
    # A dataset's name has at most one slash; asking the hub for anything else would only delay the answer.
    is_path = kind is not None or path.is_absolute() or len(path.parts) > 2 or str(source).startswith(".")
    if is_path and not path.exists():
        raise ValueError(f"data file or folder '{path}' does not exist")
    return None if path.is_dir() else kind


def _text_files(folder: Path) -> list[Path]:
    """The files of a folder that holds plain text and nothing else, sorted; else nothing."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    return files if all(f.is_file() and FILE_KINDS.get(f.suffix) == "text" for f in files) else []


def _lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data file '{path}' as UTF-8 text: {error}") from error


def _json_rows(path: Path, kind: str) -> Iterator[Any]:
    lines = _lines(path)
    if kind == "json":
        whole = "".join(lines)
        if whole.lstrip().startswith("["):
            yield from _parse_json(whole, f"'{path}'")
            return
        lines = iter(whole.split("\n"))
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse_json(line, f"line {line_number} of '{path}'")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read as JSON") from error
    # Python converts no whole number of more than 4,300 digits.
    except ValueError as error:
        raise ValueError(f"{where} holds a number of too many digits") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    # pyarrow comes with `datasets`; neither is needed, nor its import time spent, for text and JSON.
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read parquet file '{path}': {error}") from error


def _dataset_rows(name: str, split: str, *, streaming: bool) -> Iterator[Any]:
    import datasets

    dataset_name, _, config = name.partition(":")
    folder = Path(dataset_name)
    saved = [folder / marker for marker in ("dataset_info.json", "dataset_dict.json")]
    try:
        if any(marker.is_file() for marker in saved):
            data = datasets.load_from_disk(dataset_name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(dataset_name, config or None, split=split, streaming=streaming)
        yield from data  # which, when streaming, is what reads the files
    # The library raises its own, its file readers' and its transport's errors; all mean the same here.
    except Exception as error:
        place = "a folder" if folder.is_dir() else "not a file or folder here"
        raise ValueError(
            f"data '{name}' ({place}) cannot be loaded by `datasets` with split '{split}': "
            f"{type(error).__name__}: {error}"
        ) from error


def _document(
    row: Any, where: str, text_column: str, domain_column: str, default_domain: str
) -> Document | None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with the key '{text_column}'")
    for column in {text_column, domain_column} - {"domain"}:
        if column not in row:
            raise ValueError(f"{where} has no column '{column}'; it has {', '.join(map(repr, row))}")
    text = row[text_column]
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise ValueError(f"{where}: column '{text_column}' holds a {type(text).__name__}, not text")
    domain = row.get(domain_column)
    document = Document(text, default_domain if domain is None else str(domain))
    for column, value in ((text_column, document.text), (domain_column, document.domain)):
        _check_characters(value, f"{where}: column '{column}'")
    return document


def _check_characters(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell but no tokenizer and no file can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start]!r}, half of a character's surrogate pair, at position "
            f"{error.start}; mend or leave out the row"
        ) from error
