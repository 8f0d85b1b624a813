"""What a teacher cache and a begun run depend on, and how a cache is filled."""

import json
import random
from pathlib import Path

import pytest
from moekit.distill import teacher_cache_format
from moekit.distill.teachers import ModelTeacher
from moekit.scripts import cli
from moekit.scripts.distill_options import DistillOptions
from moekit.scripts.distill_prepare import DistillJob, prepare_distillation
from moekit.scripts.distill_teacher import TeacherSource
from moekit.scripts.tagged_rows import TaggedRow
from moekit.scripts.train_data import Examples, processor_fingerprint, tag_examples
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import BertForTokenClassification, PreTrainedTokenizerFast

from .tiny_checkpoints import tiny_tokenizer, write_checkpoint
from .tiny_distillation import CLASSIFY, distill, tiny_judge, words, write_pictures, write_vit
from .tiny_training import tiny_bert, write_dense, write_rows

TAGGED = [TaggedRow(("the", "router", "is", "idle"), ("o", "x", "o", "o")), TaggedRow(("token",), ("x",))]


@pytest.fixture
def unasked(monkeypatch) -> None:
    """A teacher that nobody may load."""

    def load(self, device):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(TeacherSource, "load", load)


def prepared(student: Path, teacher: Path, data: Path, out: Path, *more: object) -> DistillJob:
    return prepare_distillation(cli.parse(words(student, teacher, data, out, *more)))


def marked(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, which ends every text with a special token."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A <end>", pair=None, special_tokens=[("<end>", 0)])
    return tokenizer


def tagged(tokenizer: PreTrainedTokenizerFast, rows: list[TaggedRow] = TAGGED, seq_len: int = 32) -> Examples:
    options = DistillOptions(model="m", seq_len=seq_len)
    model = BertForTokenClassification(tiny_bert().config)
    return tag_examples(options, rows, TAGGED, ("o", "x"), tokenizer, model)


def test_a_picture_that_changed_under_its_name_is_another_example(tmp_path, capsys):
    """And one that changed its place alone is not."""
    student = write_vit(tmp_path / "student", 16, has_weights=False)
    teacher = write_vit(tmp_path / "teacher", 24, has_weights=True)
    pictures, out = write_pictures(tmp_path / "pictures"), tmp_path / "out"
    given = (*CLASSIFY, "--eval-share", 0.2, "--steps", 1, "--no-compare", "--cache", tmp_path / "cache")
    assert distill(student, teacher, pictures, out, *given) == 0
    before = prepared(student, teacher, pictures, out / "next", *given)
    pictures = pictures.rename(tmp_path / "moved")
    assert prepared(student, teacher, pictures, out / "next", *given).inputs == before.inputs
    for path in pictures.rglob("*.png"):
        with Image.open(path) as picture:
            picture.rotate(180).save(path)
    after = prepared(student, teacher, pictures, out / "next", *given[:-2])
    assert after.inputs["examples"] != before.inputs["examples"]
    assert distill(student, teacher, pictures, tmp_path / "other", *given) == 2
    assert "'source data' is" in capsys.readouterr().err


def test_examples_of_texts_depend_on_how_they_are_read(judge, rows, tmp_path):
    student, other = write_dense(tmp_path / "bert", tiny_bert()), tmp_path / "other"
    marked(tiny_tokenizer()).save_pretrained(other)
    jobs = [
        prepared(student, judge, rows, tmp_path / "out", *CLASSIFY, *more)
        for more in ((), (), ("--seq-len", 8), ("--tokenizer", other))
    ]
    assert jobs[0].inputs == jobs[1].inputs
    assert len({job.inputs["examples"] for job in jobs}) == 3
    assert len({job.examples.train_fingerprint for job in jobs}) == 1  # a teacher reads them in its own way


def test_a_fingerprint_of_a_tokenizer_has_nothing_of_its_last_call():
    tokenizer = tiny_tokenizer()
    before = processor_fingerprint(tokenizer)
    tokenizer(["the router", "is"], padding=True, truncation=True, max_length=2)
    assert processor_fingerprint(tokenizer) == before
    tokenizer.truncation_side = "left"
    assert (
        len({before, processor_fingerprint(tokenizer), processor_fingerprint(marked(tiny_tokenizer()))}) == 3
    )


def test_examples_of_tokens_are_what_the_tokenizer_made():
    one = tagged(tiny_tokenizer())
    assert tagged(tiny_tokenizer()).fingerprint == one.fingerprint
    others = [
        tagged(marked(tiny_tokenizer())),
        tagged(tiny_tokenizer(280)),
        tagged(tiny_tokenizer(), seq_len=3),
        tagged(tiny_tokenizer(), TAGGED[::-1]),
        tagged(tiny_tokenizer(), [TaggedRow(row.words, ("o",) * len(row.tags)) for row in TAGGED]),
    ]
    for name in ("train_fingerprint", "fingerprint"):
        assert len({getattr(found, name) for found in (one, *others)}) == 6


def test_a_tagger_reads_what_its_student_reads(tmp_path, capsys):
    data, config = tmp_path / "tags.jsonl", tiny_bert().config
    rows = [json.dumps({"tokens": row.words, "labels": row.tags}) for row in TAGGED * 4]
    data.write_text("\n".join(rows), encoding="utf-8")
    config.id2label = {0: "o", 1: "x"}
    teacher = write_checkpoint(tmp_path / "teacher", BertForTokenClassification(config))
    student = write_checkpoint(tmp_path / "student", tiny_bert())
    given = ("--task", "token-classification")
    prepared(student, teacher, data, tmp_path / "out", *given)
    marked(tiny_tokenizer()).save_pretrained(teacher)
    assert distill(student, teacher, data, tmp_path / "out", *given) == 2
    assert "or add other special tokens, which --task token-classification" in capsys.readouterr().err
    marked(tiny_tokenizer()).save_pretrained(student)
    prepared(student, teacher, data, tmp_path / "out", *given)


def test_a_cache_serves_every_held_out_set_and_seed(judge, rows, tmp_path, request, capsys):
    student = write_dense(tmp_path / "bert", tiny_bert())
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    few, fewer, reordered = (tmp_path / f"{name}.jsonl" for name in ("few", "fewer", "reordered"))
    few.write_text("".join(lines[:8]), encoding="utf-8")
    fewer.write_text("".join(lines[:5]), encoding="utf-8")
    reordered.write_text("".join(random.Random(0).sample(lines, len(lines))), encoding="utf-8")
    given = (*CLASSIFY, "--steps", 1, "--no-compare", "--cache", tmp_path / "cache")
    assert distill(student, judge, rows, tmp_path / "first", *given, "--eval-data", few) == 0
    request.getfixturevalue("unasked")
    assert distill(student, judge, rows, tmp_path / "second", *given, "--eval-data", fewer, "--seed", 1) == 0
    capsys.readouterr()
    assert distill(student, judge, reordered, tmp_path / "third", *given, "--eval-data", few) == 2
    assert "'source data' is" in capsys.readouterr().err


def test_a_cache_is_filled_in_evaluation_batches_and_bounded_shards(
    dense, checkpoint, data, tmp_path, monkeypatch
):
    says, sizes = ModelTeacher.says, []

    def note(self, batch, rows):
        sizes.append(len(batch["labels"]))
        return says(self, batch, rows)

    monkeypatch.setattr(ModelTeacher, "says", note)
    monkeypatch.setattr(teacher_cache_format, "MAX_SHARD_BYTES", 20 * 32 * 32 * 4)  # of 32 rows, 32 wide
    caches = [tmp_path / "one", tmp_path / "other"]
    for cache, batch in zip(caches, (6, 12), strict=True):
        more = ("--batch-size", batch, "--steps", 1, "--no-compare", "--cache", cache)
        assert distill(dense, checkpoint, data, tmp_path / f"out-{batch}", *more) == 0
        assert max(sizes) == batch
        sizes.clear()
        index = json.loads((cache / "index.json").read_text(encoding="utf-8"))
        assert index["spec"]["shard_examples"] == 20
        assert len(list(cache.glob("shard-*"))) == -(-index["spec"]["num_examples"] // 20)
    index, other = ((cache / "index.json").read_bytes() for cache in caches)
    assert index == other


@pytest.mark.parametrize("names", [[str(number) for number in range(6)], ["sums", "salad", "prose"]])
def test_a_teacher_of_more_labels_is_pointed_out(names, rows, dense, tmp_path, capsys):
    data = rows
    if names[0] == "0":
        data = write_rows(tmp_path / "rows.jsonl")
        text = data.read_text(encoding="utf-8").replace('"label": "sums"', '"label": "1"')
        data.write_text(text.replace('"label": "salad"', '"label": "0"'), encoding="utf-8")
    teacher = write_checkpoint(tmp_path / "teacher", tiny_judge(data, names))
    capsys.readouterr()
    job = prepared(dense, teacher, data, tmp_path / "out", *CLASSIFY)
    assert job.labels == tuple(names)
    said = capsys.readouterr().err
    assert f"warning: the data have 2 labels and '{teacher}' knows {len(names)}, so the student gets" in said
