"""What `moekit distill` refuses, with what to do, before it has begun anything."""

import json
import shutil
import typing
from pathlib import Path

import pytest
import torch
from moekit.distill.auxiliary_head import AuxiliaryHeadSpec
from moekit.distill.gradient_alignment import WHERE
from moekit.distill.losses import CENTRES, LOSSES
from moekit.distill.recipe import HEADS
from moekit.distill.teacher_cache_format import STORED_DTYPES, TENSORS
from moekit.distill.trainer import OWN_ARGUMENTS
from moekit.scripts import cli
from moekit.scripts.distill_checks import OPTION_OF, head_spec
from moekit.scripts.distill_options import DistillOptions
from moekit.scripts.staging import partial_folder
from transformers import AutoModelForSequenceClassification

from .tiny_checkpoints import VOCABULARY, tiny_qwen, write_checkpoint
from .tiny_distillation import CLASSIFY, FOREIGN, distill, write_foreign
from .tiny_training import tiny_llama, write_config, write_dense

CACHE = ("--cache", "cache")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A teacher with another tokenizer."""
    return write_foreign(tmp_path_factory.mktemp("foreign") / "moe", tiny_qwen(vocab_size=FOREIGN))


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that has to be refused in one line, with these words, and to leave nothing behind."""

    def run(student: Path, teacher: Path, data: Path, *more: object, says: str, without: str = "") -> None:
        out, before = tmp_path / "out", sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert distill(student, teacher, data, out, *more, without=without) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("moekit: error: ")
        assert says in error
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("loss", {*LOSSES, "dhkd"}),
        ("heads", {*HEADS, "auto"}),
        ("center", set(CENTRES)),
        ("align_at", set(WHERE)),
        ("cache_kind", {*TENSORS, "auto"}),
        ("cache_dtype", set(STORED_DTYPES)),
    ],
)
def test_choices_are_those_of_the_library(option, allowed):
    assert set(typing.get_args(typing.get_type_hints(DistillOptions)[option])) == allowed


def test_heads_are_those_of_the_library():
    for kind in typing.get_args(typing.get_type_hints(DistillOptions)["auxiliary_head"]):
        AuxiliaryHeadSpec(kind=kind)
    for norm in typing.get_args(typing.get_type_hints(DistillOptions)["auxiliary_norm"]):
        AuxiliaryHeadSpec(norm=norm)
    paper, options = AuxiliaryHeadSpec(), DistillOptions(model="m")
    assert head_spec(options) == paper


def test_every_option_of_a_loss_is_one_of_some_loss():
    taken = {name for method in LOSSES.values() for name in typing.get_type_hints(method.function)}
    assert set(OPTION_OF.values()) <= taken


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--loss", "dhkd", "--heads", "single"), "for one head take binary-kl-norm"),
        (("--align-gradients",), "--align-gradients is for two heads; add --heads dual"),
        (("--align-every", 2), "--align-every is for --align-gradients"),
        (("--align-smoothing", 0.5, "--loss", "dhkd"), "--align-smoothing is for --align-gradients"),
        (("--auxiliary-width", 8), "--auxiliary-width is for --heads dual"),
        (("--auxiliary-norm", "rms"), "--auxiliary-norm is for --heads dual"),
        (("--loss", "dhkd", "--auxiliary-dropout", 1), "dropout=1.0 is not in [0, 1)"),
        (("--loss", "dhkd", "--auxiliary-norm", "batch"), "padding included; take rms or none"),
        (
            ("--loss", "dhkd", "--auxiliary-head", "linear", "--auxiliary-norm", "rms"),
            "--auxiliary-norm is for --auxiliary-head bottleneck",
        ),
        (("--heads", "dual", "--label-weight", 0), "would leave the task head untrained"),
        (("--weight", 0, "--label-weight", 0), "leave nothing to learn"),
        (("--stop-epoch", 2, "--label-weight", 0), "from epoch 2 on; leave out --stop-epoch"),
        (("--beta", 0.5), "--loss kl with --beta 0.5 cannot be: the loss 'kl' takes no options"),
        (("--center", "mean"), "--loss kl with --center mean cannot be"),
        (("--top-k", 4, "--loss", "jsd"), "the loss 'jsd' takes beta, not 'k'"),
        (("--skew", 0.1, "--loss", "mse"), "not 'skew'"),
        (("--loss", "jsd", "--beta", 2), "beta=2.0 is not between 0"),
        (("--loss", "skewed-kl", "--skew", 1), "skew=1.0 is not"),
        (("--loss", "top-k-kl", "--top-k", 0), "--top-k 0 is not a positive number"),
        (("--loss", "top-k-kl", "--top-k", 400), "k=400 is not between 1 and the 300 classes"),
        (("--loss", "bild", "--top-k", 2), "k=2 is not between 3 and the"),
        (("--loss", "bild", "--top-k", 100_000), "k=100000 is not between 3 and the 300 classes"),
        (("--temperature", 0), "--temperature 0.0 is not a positive number"),
        (("--weight", -1), "weight=-1.0 is not a finite number of at least 0"),
        (("--label-weight", "nan"), "label_weight=nan is not a finite number of at least 0"),
        (("--load-balance", -1), "load_balance=-1.0 is not a finite number of at least 0"),
        (("--stop-epoch", 0), "--stop-epoch 0.0 is not a positive number"),
        (
            ("--stop-epoch", 1),
            "ends after 0.1538 (4 steps, 26 an epoch): leave out stop_epoch",
        ),
        (("--stop-epoch", 0.5, "--steps", 13), "dropped after epoch 0.5, and the training ends after 0.5"),
        (("--loss", "dhkd", "--auxiliary-width", 0), "--auxiliary-width 0 is not a positive number"),
        (("--loss", "dhkd", "--align-gradients", "--align-every", 0), "--align-every 0 is not a positive"),
        (("--loss", "dhkd", "--align-gradients", "--align-smoothing", 1), "--align-smoothing 1.0 is not at"),
        (("--train-only", "routers"), "--train-only routers is for students with experts, and '"),
        (("--load-balance", 0.1), "--load-balance is for students with experts, and '"),
        (("--train-only", "routers", "--loss", "dhkd"), "leave out --heads dual"),
        (("--cache-kind", "hidden"), "--cache-kind is for --cache"),
        (("--cache-dtype", "float32"), "--cache-dtype is for --cache"),
        ((*CACHE, "--cache-kind", "top-k"), "a top-k cache is for --loss top-k-kl; --loss kl needs"),
        ((*CACHE, "--cache-kind", "logits"), "does not fit --task causal-lm; take hidden or top-k"),
        (("--teacher-tokenizer", "/no/where"), "'/no/where'"),
    ],
)
def test_options_that_cannot_be(dense, checkpoint, data, refused, options, says):
    refused(dense, checkpoint, data, *options, says=says)


@pytest.mark.parametrize("where", ["all", "backbone"])
def test_parameters_cannot_be_compared_in_parts(dense, checkpoint, data, refused, where):
    given = ("--loss", "dhkd", "--align-gradients", "--align-at", where, "--gradient-accumulation", 2)
    refused(dense, checkpoint, data, *given, says="2 micro-batches: align at the features")


@pytest.mark.parametrize("name", OWN_ARGUMENTS)
def test_training_arguments_that_distillation_sets_itself(dense, checkpoint, data, tmp_path, refused, name):
    file = tmp_path / "more.json"
    file.write_text(json.dumps({name: None}), encoding="utf-8")
    given = ("--training-arguments", file)
    refused(dense, checkpoint, data, *given, says=f"sets {name}, which distillation sets itself")


def test_there_has_to_be_a_teacher(dense, data, tmp_path, capsys):
    assert cli.main(["distill", str(dense), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "--teacher is missing: name the model to learn from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_has_weights(dense, data, tmp_path, refused):
    config = write_config(tmp_path / "config")
    for name in (config, config / "config.json"):
        refused(dense, name, data, says=f"--teacher '{name}' has no weights; name a trained checkpoint")


def test_a_teacher_is_whole(dense, checkpoint, data, tmp_path, refused):
    shutil.copytree(checkpoint, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    refused(dense, tmp_path / "cut", data, says="is truncated: it has ")


@pytest.mark.parametrize("cache", [(), CACHE])
def test_a_teacher_of_nan(dense, data, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    model = tiny_qwen()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj")[0, 0, 0] = torch.nan
    teacher = write_checkpoint(tmp_path / "teacher", model)
    assert distill(dense, teacher, data, tmp_path / "out", *cache) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
    assert not any(path.is_file() for path in (partial_folder(tmp_path / "out") / "work").rglob("*"))


def test_other_tokenizers_need_a_loss_for_them(dense, foreign, data, refused):
    says = "different tokenizers (300 and 280 tokens), and --loss jsd compares them token by token; take --l"
    refused(dense, foreign, data, "--loss", "jsd", says=says)


@pytest.mark.parametrize("without", ["", "--seq-len"])
def test_a_teacher_reads_as_far_as_its_student(dense, data, tmp_path, refused, without):
    teacher = write_checkpoint(tmp_path / "teacher", tiny_qwen(max_position_embeddings=16))
    says = "the teacher's context of 16 tokens is less than the student's sequences of"
    refused(dense, teacher, data, says=says, without=without)


def test_a_copied_head_has_the_teachers_tokens(checkpoint, data, tmp_path, refused):
    student = write_dense(tmp_path / "student", tiny_llama(vocab_size=VOCABULARY + 20))
    given = ("--heads", "dual", "--auxiliary-head", "copy")
    refused(student, checkpoint, data, *given, says="knows 300 of them; take --auxiliary-head linear")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (("sums", "prose"), "the data have the labels salad, sums, and the teacher '"),
        (("sums", "prose", "verse"), "knows 3: sums, prose, verse; give a teacher that was trained on these"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), "knows 3: LABEL_0, LABEL_1, LABEL_2; give a teacher"),
    ],
)
def test_a_teacher_of_other_labels(dense, judge, rows, tmp_path, refused, labels, says):
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    model.config.id2label = dict(enumerate(labels))
    teacher = write_checkpoint(tmp_path / "teacher", model)
    refused(dense, teacher, rows, *CLASSIFY, says=says)


def test_a_student_that_numbers_the_labels_otherwise(judge, rows, tmp_path, refused):
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    model.config.id2label = dict(enumerate(reversed(model.config.id2label.values())))
    student = write_checkpoint(tmp_path / "student", model)
    refused(student, judge, rows, *CLASSIFY, says="renumber the rows of one head")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--loss", "dkd"), "--loss dkd cannot be: got logits of 2 classes"),
        (("--loss", "bild"), "--loss bild cannot be: k=8 is not between 3 and the 2 classes"),
        ((*CACHE, "--cache-kind", "hidden"), "does not fit --task classification; take logits"),
    ],
)
def test_what_cannot_be_of_two_classes(dense, judge, rows, refused, options, says):
    refused(dense, judge, rows, *CLASSIFY, *options, says=says)


def test_a_borrowed_tokenizer_has_to_fit(judge, rows, tmp_path, refused):
    tiny_llama(vocab_size=VOCABULARY - 20).config.save_pretrained(tmp_path / "small")
    refused(tmp_path / "small", judge, rows, *CLASSIFY, says="has 300 tokens and '")


def test_a_teacher_without_the_head(dense, checkpoint, rows, tmp_path, capsys):
    assert distill(dense, checkpoint, rows, tmp_path / "out", *CLASSIFY) == 2
    says = "has no head for --task classification that fits its config.json (score.weight), so it was"
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_caches_of_something_else(dense, foreign, data, tmp_path, refused):
    """Of other data, of another teacher, of its other tokenizer, of another kind."""
    cache = ("--cache", tmp_path / "cache", "--no-compare")
    given = ("--loss", "uld", *cache)
    assert distill(dense, foreign, data, tmp_path / "first", *given, "--steps", 1) == 0
    shutil.copytree(foreign, tmp_path / "copy")
    assert distill(dense, tmp_path / "copy", data, tmp_path / "second", *given, "--steps", 1) == 0
    other = write_foreign(tmp_path / "other", tiny_qwen(vocab_size=FOREIGN, num_experts_per_tok=1))
    says = "'source {}' is "
    for option in (("--seed", 1), ("--eval-share", 0.3)):
        refused(dense, foreign, data, *given, *option, says=says.format("data"))
    refused(dense, other, data, *given, says=says.format("model"))
    refused(dense, foreign, data, *given, "--teacher-tokenizer", dense, says=says.format("tokenizer"))
    refused(dense, foreign, data, *given, "--teacher-dtype", "bfloat16", says=says.format("dtype"))
    refused(dense, foreign, data, *given, "--cache-dtype", "bfloat16", says="'dtype' is 'auto' there")


def test_a_cache_of_texts_that_were_cut_otherwise(dense, judge, rows, tmp_path, refused):
    given = (*CLASSIFY, "--cache", tmp_path / "cache", "--no-compare")
    assert distill(dense, judge, rows, tmp_path / "first", *given, "--steps", 1) == 0
    refused(dense, judge, rows, *given, "--seq-len", 4, says="'source length' is '32' there, '4' here")


def test_folders_that_are_no_cache(dense, checkpoint, data, tmp_path, refused):
    folder, file = tmp_path / "letters", tmp_path / "letter.txt"
    folder.mkdir()
    for path in (file, folder / "letter.txt"):
        path.write_text("Dear teacher,", encoding="utf-8")
    refused(dense, checkpoint, data, "--cache", file, says="is a file; a teacher cache needs a folder")
    refused(dense, checkpoint, data, "--cache", folder, says="holds 'letter.txt', which is no file of a")
    says = "are one in the other; keep them apart"
    for cache in (tmp_path / "out", tmp_path / "out" / "cache", tmp_path):
        refused(dense, checkpoint, data, "--cache", cache, says=says)
