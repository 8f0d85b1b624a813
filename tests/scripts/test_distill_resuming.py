"""What `moekit distill` keeps on the disk: what a teacher said, and the work of a run that was killed."""

import gc
import shutil
import weakref
from pathlib import Path

import pytest
from moekit.distill import DistillTrainer, teacher_cache_build
from moekit.distill.dual_head import HEAD_FILE, SPEC_FILE
from moekit.distill.trainer import ALIGNMENT_FILE
from moekit.scripts.distill_teacher import TeacherSource
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file

from .tiny_distillation import (
    ALIGNED,
    CLASSIFY,
    changed,
    distill,
    distill_killed,
    losses,
    record,
)
from .tiny_training import KilledError, tiny_bert, write_dense

SAVED = ("--save-steps", 1)
ACCUMULATED = (*ALIGNED, *SAVED, "--gradient-accumulation", 2)
SECOND_HEAD = (SPEC_FILE, HEAD_FILE, ALIGNMENT_FILE)
IN_TWO_PHASES = (*ALIGNED, *SAVED, "--stop-epoch", 0.1, "--steps", 6)
"""A step of 103 blocks is a 26th of an epoch: the teacher goes after the third."""


@pytest.fixture(scope="module")
def whole(dense, checkpoint, data, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert distill(dense, checkpoint, data, out, *ACCUMULATED) == 0
    return out


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The teachers whose weights were read."""
    names: list[str] = []
    load = TeacherSource.load

    def note(self, device):
        names.append(self.source.name)
        return load(self, device)

    monkeypatch.setattr(TeacherSource, "load", note)
    return names


def test_a_killed_run_goes_on_to_the_same_weights(
    dense, checkpoint, data, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    distill_killed(monkeypatch, 3, dense, checkpoint, data, out, *ACCUMULATED)
    assert not out.exists()
    assert distill(dense, checkpoint, data, out, *ACCUMULATED) == 0
    assert "Going on from step 2" in capsys.readouterr().err
    assert changed(whole, out) == []
    assert losses(out) == losses(whole)
    assert not partial_folder(out).exists()


def test_a_killed_classifier_goes_on_with_its_alignment(judge, rows, tmp_path, monkeypatch):
    """And with the batch statistics of its second head."""
    bert = write_dense(tmp_path / "bert", tiny_bert())
    given = (*CLASSIFY, *ACCUMULATED, "--batch-size", 3, "--align-every", 2)
    assert distill(bert, judge, rows, tmp_path / "whole", *given) == 0
    trainer = distill_killed(monkeypatch, 4, bert, judge, rows, tmp_path / "out", *given)
    assert load_file(trainer / "checkpoint-3" / ALIGNMENT_FILE)["factor"] > 1
    assert distill(bert, judge, rows, tmp_path / "out", *given) == 0
    assert changed(tmp_path / "whole", tmp_path / "out") == []
    for name in ("loss", "alignment_factor"):
        assert losses(tmp_path / "out", name) == losses(tmp_path / "whole", name)


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3)), 5])
def test_a_run_killed_in_either_phase_goes_on(dense, checkpoint, data, tmp_path, monkeypatch, step):
    assert distill(dense, checkpoint, data, tmp_path / "whole", *IN_TWO_PHASES) == 0
    assert len(losses(tmp_path / "whole", "distillation")) == 3
    trainer = distill_killed(monkeypatch, step, dense, checkpoint, data, tmp_path / "out", *IN_TWO_PHASES)
    assert (trainer / f"checkpoint-{step - 1}" / HEAD_FILE).exists() == (step - 1 < 3)
    assert distill(dense, checkpoint, data, tmp_path / "out", *IN_TWO_PHASES) == 0
    assert changed(tmp_path / "whole", tmp_path / "out") == []
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_damaged_second_head_makes_the_run_go_on_from_before(
    dense, checkpoint, data, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    trainer = distill_killed(monkeypatch, 4, dense, checkpoint, data, out, *ACCUMULATED)
    head = trainer / "checkpoint-3" / HEAD_FILE
    head.write_bytes(head.read_bytes()[:-40])
    capsys.readouterr()
    assert distill(dense, checkpoint, data, out, *ACCUMULATED) == 0
    said = capsys.readouterr().err
    assert "checkpoint-3 is not used and removed" in said
    assert "Going on from step 2" in said
    assert changed(whole, out) == []


@pytest.fixture(scope="module")
def killed(dense, checkpoint, data, tmp_path_factory) -> Path:
    """Of two phases, killed in the first; two checkpoints are left."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        distill_killed(patch, 3, dense, checkpoint, data, out, *IN_TWO_PHASES)
    return partial_folder(out)


@pytest.mark.parametrize("lost", [SECOND_HEAD[:1], SECOND_HEAD[1:2], SECOND_HEAD[2:], SECOND_HEAD], ids=str)
def test_a_checkpoint_that_lost_a_file_is_not_taken_for_one_of_the_second_phase(
    dense, checkpoint, data, killed, tmp_path, capsys, lost
):
    out = tmp_path / "out"
    shutil.copytree(killed, partial_folder(out))
    for name in lost:
        (partial_folder(out) / "work" / "trainer" / "checkpoint-2" / name).unlink()
    capsys.readouterr()
    assert distill(dense, checkpoint, data, out, *IN_TWO_PHASES) == 0
    said = capsys.readouterr().err
    assert f"checkpoint-2 is not used and removed: {lost[0]} is missing" in said
    assert "Going on from step 1" in said
    assert len(losses(out, "distillation")) == 3


@pytest.mark.parametrize("compares", [False, True])
def test_the_teacher_is_gone_in_the_second_phase(
    dense, checkpoint, data, tmp_path, monkeypatch, loaded, compares
):
    """And comes back for the comparison, if that is wanted."""
    teachers, alive = [], []
    load, stop = TeacherSource.in_memory, DistillTrainer.stop_distilling

    def noted(self, device):
        teacher = load(self, device)
        teachers.append(weakref.ref(teacher.model))
        return teacher

    def looked_after(self):
        stop(self)
        gc.collect()
        alive.append(teachers[0]() is not None)

    monkeypatch.setattr(TeacherSource, "in_memory", noted)
    monkeypatch.setattr(DistillTrainer, "stop_distilling", looked_after)
    given = (*IN_TWO_PHASES, *(() if compares else ("--no-compare",)))
    assert distill(dense, checkpoint, data, tmp_path / "out", *given) == 0
    assert alive
    assert not any(alive)
    assert len(loaded) == 1 + compares
    assert ("kl" in record(tmp_path / "out")["metrics"]["after"]) == compares


def test_an_unfinished_run_of_other_options_is_refused(
    dense, checkpoint, data, tmp_path, monkeypatch, capsys
):
    distill_killed(monkeypatch, 2, dense, checkpoint, data, tmp_path / "out", *SAVED)
    assert distill(dense, checkpoint, data, tmp_path / "out", *SAVED, "--temperature", 2) == 2
    shown = capsys.readouterr().err
    assert "had other settings (--temperature: None then, 2.0 now); give its command again" in shown


@pytest.mark.parametrize("options", [(), pytest.param((*ALIGNED, "--bf16"), marks=pytest.mark.slow)])
def test_hidden_states_teach_the_same_as_the_teacher(dense, checkpoint, data, tmp_path, loaded, options):
    assert distill(dense, checkpoint, data, tmp_path / "memory", "--no-compare", *options) == 0
    given = ("--cache", tmp_path / "cache", "--no-compare", *options)
    assert distill(dense, checkpoint, data, tmp_path / "built", *given) == 0
    assert loaded == [str(checkpoint)] * 2
    assert distill(dense, checkpoint, data, tmp_path / "read", *given) == 0
    assert loaded == [str(checkpoint)] * 2
    assert changed(tmp_path / "built", tmp_path / "read") == []
    # Not to the bit: experts multiply another number of tokens at a time.
    assert losses(tmp_path / "read") == pytest.approx(losses(tmp_path / "memory"), rel=1e-5)


def test_the_likeliest_tokens(dense, checkpoint, data, tmp_path, loaded):
    given = ("--loss", "top-k-kl", "--top-k", 16, "--no-compare")
    assert distill(dense, checkpoint, data, tmp_path / "memory", *given) == 0
    kept = (*given, "--cache", tmp_path / "cache", "--cache-kind", "top-k")
    assert distill(dense, checkpoint, data, tmp_path / "kept", *kept) == 0
    assert load_file(tmp_path / "cache" / "shard-00000.safetensors")["ids"].shape[1] == 16
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "memory"), rel=1e-4)
    assert distill(dense, checkpoint, data, tmp_path / "again", *kept) == 0
    assert changed(tmp_path / "kept", tmp_path / "again") == []
    assert loaded == [str(checkpoint)] * 2


def test_the_logits_of_a_classifier(dense, judge, rows, tmp_path, loaded):
    given = (*CLASSIFY, *ALIGNED, "--no-compare")
    assert distill(dense, judge, rows, tmp_path / "memory", *given) == 0
    kept = (*given, "--cache", tmp_path / "cache")
    for name in ("built", "read"):
        assert distill(dense, judge, rows, tmp_path / name, *kept) == 0
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "memory"), rel=1e-5)
    assert changed(tmp_path / "built", tmp_path / "read") == []
    assert loaded == [str(judge)] * 2


def test_an_interrupted_build_goes_on(dense, checkpoint, data, tmp_path, monkeypatch, loaded):
    text = tmp_path / "text.jsonl"
    text.write_text(data.read_text(encoding="utf-8") * 2, encoding="utf-8")
    short = ("--seq-len", 8, "--no-compare")  # 800 examples are two shards
    given = (*short, "--cache", tmp_path / "cache")
    save, saved = teacher_cache_build._save, []

    def die(file, *rest):
        if file.name == "shard-00001.safetensors":
            raise KilledError
        saved.append(file.name)
        save(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache_build, "_save", die)
        with pytest.raises(KilledError):
            distill(dense, checkpoint, text, tmp_path / "out", *given)
    assert saved == ["head.safetensors", "shard-00000.safetensors"]
    first = (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns
    assert distill(dense, checkpoint, text, tmp_path / "out", *given) == 0
    assert (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert distill(dense, checkpoint, text, tmp_path / "whole", *short, "--cache", tmp_path / "other") == 0
    assert changed(tmp_path / "whole", tmp_path / "out") == []
