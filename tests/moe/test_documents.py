import gzip
import json
from pathlib import Path

import datasets
import pytest
from moekit.moe.documents import Document, load_documents

ROWS = [
    {"text": "one\n\ntwo", "domain": "a"},
    {"text": "drei – 3", "domain": "b"},
    {"text": "four", "domain": "a"},
]
DOCUMENTS = [Document(row["text"], row["domain"]) for row in ROWS]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_jsonl(folder: Path) -> Path:
    path = folder / "d.jsonl"
    path.write_text("\n" + JSON_LINES + "\n", encoding="utf-8")
    return path


def write_gzip(folder: Path) -> Path:
    path = folder / "d.jsonl.gz"
    path.write_bytes(gzip.compress(JSON_LINES.encode()))
    return path


def write_json_list(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    return path


def write_json_lines(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(JSON_LINES, encoding="utf-8")
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "d.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def write_saved_dataset(folder: Path) -> Path:
    path = folder / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    return path


WRITERS = [write_jsonl, write_gzip, write_json_list, write_json_lines, write_parquet, write_saved_dataset]


@pytest.mark.parametrize("write", WRITERS)
def test_every_form_gives_the_same_documents(tmp_path, write):
    path = write(tmp_path)

    assert load_documents(path) == DOCUMENTS
    assert load_documents(str(path), limit=2) == DOCUMENTS[:2]


def test_a_text_file_is_one_document_and_its_name_the_domain(tmp_path):
    (tmp_path / "wiki.test.txt").write_text("one\n\ntwo\n", encoding="utf-8")

    assert load_documents(tmp_path / "wiki.test.txt") == [Document("one\n\ntwo\n", "wiki")]


def test_a_folder_of_texts_is_one_domain_per_file(tmp_path):
    (tmp_path / "b.md").write_text("two", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")

    assert load_documents(tmp_path) == [Document("one", "a"), Document("two", "b")]


def test_without_a_domain_column_the_file_is_the_domain_and_empty_rows_go(tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_text('{"body": "x"}\n{"body": "  "}\n{"body": null}\n{"body": "y"}\n', encoding="utf-8")

    assert load_documents(path, text_column="body") == [Document("x", "news"), Document("y", "news")]


def test_the_names_of_columns_can_be_chosen(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "x", "source": 7}\n', encoding="utf-8")

    assert load_documents(path, text_column="body", domain_column="source") == [Document("x", "7")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"text\nx\n", r"ends in '\.csv', not in one of \.txt, \.md, \.jsonl, \.json, \.parquet"),
        (
            "d.jsonl",
            b'{"question": 1, "answer": 2}\n',
            r"row 1 of .* no column 'text'; it has 'question', 'answer'",
        ),
        ("d.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"line 2 of .* is not valid JSON"),
        ("d.jsonl", b'["x"]\n', r"row 1 of .* is a list, not an object with the key 'text'"),
        ("d.jsonl", b'{"text": 3}\n', r"column 'text' holds a int, not text"),
        ("d.jsonl", b"", r"holds no text"),
        ("d.txt", b" \n", r"holds no text"),
        ("d.txt", b"\xe9", r"cannot read data file .* as UTF-8"),
        ("d.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], r"cannot read data file"),
        ("d.jsonl.gz", b"no gzip", r"cannot read data file"),
        ("d.parquet", b"PAR1 no", r"cannot read parquet file"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a/b/missing", "/missing/folder"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name):
    with pytest.raises(ValueError, match="does not exist"):
        load_documents(name)


def test_a_domain_column_that_was_asked_for_must_exist(tmp_path):
    with pytest.raises(ValueError, match="no column 'topic'; it has 'text', 'domain'"):
        load_documents(write_jsonl(tmp_path), domain_column="topic")


def test_a_hub_failure_says_what_was_tried(monkeypatch):
    def fail(name, config, *, split, streaming):
        raise ConnectionError(f"no network for {name} {config} {streaming}")

    monkeypatch.setattr(datasets, "load_dataset", fail)

    with pytest.raises(
        ValueError, match=r"'owner/name:small'.*split 'test'.*no network for owner/name small True"
    ):
        load_documents("owner/name:small", split="test", limit=3)


def test_a_hub_dataset_gives_documents_in_its_own_domain(monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "x"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)

    assert load_documents("owner/name:small") == [Document("x", "name")]


def test_a_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="limit=0"):
        load_documents(write_jsonl(tmp_path), limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "[" * 100_000, r"'\S+d.json' is nested too deeply"),
        ("d.jsonl", '{"text": "x"}\n' + "[" * 100_000, r"line 2 of '\S+' is nested too deeply"),
        ("d.jsonl", '{"text": ' + "1" * 5000 + "}", r"line 1 of '\S+' holds a number of too many digits"),
        (
            "d.jsonl",
            r'{"text": "a \ud800 b"}',
            r"row 1 of '\S+': column 'text' holds .*surrogate.* position 2",
        ),
        ("d.jsonl", r'{"text": "x", "domain": "\udc00"}', "row 1 of .* column 'domain' holds .*surrogate"),
    ],
)
def test_json_that_python_cannot_take_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")

    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path / name)


def test_a_surrogate_pair_is_one_character(tmp_path):
    (tmp_path / "d.jsonl").write_text(r'{"text": "\ud83d\ude00"}', encoding="utf-8")

    assert load_documents(tmp_path / "d.jsonl") == [Document("\U0001f600", "d")]


def test_a_dataset_that_fails_while_it_is_read_says_so(monkeypatch):
    def rows():
        yield {"text": "x"}
        raise RuntimeError("shard 2 is damaged")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())

    with pytest.raises(ValueError, match=r"cannot be loaded .*shard 2 is damaged"):
        load_documents("owner/name")
