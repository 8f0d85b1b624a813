"""Rows with a label for each word, and what a model gets of them."""

import json

import pytest
import torch
from moekit.scripts import cli
from moekit.scripts.distill_options import DistillOptions
from moekit.scripts.tagged_rows import TaggedRow, read_tagged_rows
from moekit.scripts.train_data import read_tags, tag_examples
from transformers import AutoModelForTokenClassification, BertForTokenClassification

from .tiny_checkpoints import tiny_tokenizer, write_checkpoint
from .tiny_training import tiny_bert

ROWS = [TaggedRow(("the", "router", "is", "idle"), ("o", "x", "o", "o")), TaggedRow(("token",), ("x",))]
COLUMNS = "-DOCSTART- O\n\nthe o\nrouter x\nis o\nidle o\n\n\ntoken\tNN\tx\n"
LINES = "".join(json.dumps({"tokens": row.words, "labels": row.tags}) + "\n" for row in ROWS)


@pytest.mark.parametrize(("name", "text"), [("a.conll", COLUMNS), ("a.txt", COLUMNS), ("a.jsonl", LINES)])
def test_rows_are_read(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_tagged_rows(str(tmp_path / name)) == ROWS


BAD = {
    "line 2 has one column": ("a.conll", "the o\nrouter\n"),
    "has no rows": ("a.conll", "\n\n"),
    "has 2 words and 1 labels": ("a.jsonl", '{"tokens": ["a", "b"], "labels": ["x"]}'),
    "has the columns 'text'": ("a.jsonl", '{"text": "a"}'),
    "a word that is empty": ("a.jsonl", '{"tokens": ["a", " "], "labels": ["x", "y"]}'),
    "has the label None": ("a.jsonl", '{"tokens": ["a"], "labels": [null]}'),
    "is a list": ("a.jsonl", "[1]"),
    "ends in '.csv'": ("a.csv", "a,b"),
    "cannot be read": ("a.jsonl", "{"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_read(message, tmp_path):
    name, text = BAD[message]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_tagged_rows(str(tmp_path / name))


def test_a_words_first_token_has_its_label(tmp_path):
    (tmp_path / "a.conll").write_text(COLUMNS, encoding="utf-8")
    options = DistillOptions(model="m", data=str(tmp_path / "a.conll"), eval_data=str(tmp_path / "a.conll"))
    train, held_out, labels = read_tags(options)
    assert (train, held_out, labels) == (ROWS, ROWS, ("o", "x"))
    tokenizer = tiny_tokenizer()
    model = BertForTokenClassification(tiny_bert().config)
    row = tag_examples(options, train, held_out, labels, tokenizer, model).train[0]
    counted = [
        (token, label) for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0
    ]
    assert [label for _, label in counted] == [0, 1, 0, 0]
    words = tokenizer(list(ROWS[0].words), is_split_into_words=True).word_ids()
    assert [token for token, _ in counted] == [row["input_ids"][words.index(word)] for word in range(4)]


def write_tags(path):
    """Sentences in which one of the words has the other label."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(40):
        picks = torch.randint(4, (5,), generator=generator).tolist()
        lines += [f"{ROWS[0].words[pick]} {'x' if pick == 1 else 'o'}" for pick in picks] + [""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("more", [(), ("--cache", "cache"), ("--loss", "dhkd")], ids=str)
def test_token_classifiers_are_distilled(more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_tags(tmp_path / "tags.conll")
    config = tiny_bert().config
    config.id2label = {0: "x", 1: "o"}  # in another order than the data's
    teacher = write_checkpoint(tmp_path / "teacher", BertForTokenClassification(config))
    student = write_checkpoint(tmp_path / "student", tiny_bert())
    words = ["distill", student, "--teacher", teacher, "--data", data, "--out", tmp_path / "out", *more]
    quick = ["--task", "token-classification", "--steps", 4, "--batch-size", 4, "--logging-steps", 1]
    assert cli.main([*map(str, words), *map(str, quick)]) == 0
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {0: "x", 1: "o"}
    metrics = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["after"]["rows"] == 5 * 2  # of the two sentences that were held out
    assert metrics["after"]["kl"] > 0


def test_self_slimming_token_classifiers_train(tmp_path):
    data, model = write_tags(tmp_path / "tags.conll"), write_checkpoint(tmp_path / "model", tiny_bert())
    words = ["train", model, "--data", data, "--out", tmp_path / "out", "--task", "token-classification"]
    assert cli.main([*map(str, words), "--experts", "4", "--steps", "2", "--batch-size", "4"]) == 0
    point = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["metrics"]["curve"][
        "points"
    ][0]
    assert 0 <= point["accuracy"] <= 1
