import json
import typing

import pytest
from accelerate.utils import DistributedType
from moekit.moe import PARTITIONS, ROUTERS, SCHEDULES, KSchedule
from moekit.moe.dropout.router import COMBINE_RULES
from moekit.scripts import cli, train_arguments
from moekit.scripts.options import TrainOptions
from moekit.scripts.train_prepare import default_eval_experts, prepare_training
from moekit.scripts.train_rows import label_names, read_labelled_rows

from .tiny_training import tiny_llama, train, words, write_config, write_rows


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("schedule", set(SCHEDULES)),
        ("combine", {*COMBINE_RULES, "auto"}),
        ("partition", {*PARTITIONS, "coactivation"}),
    ],
)
def test_choices_are_those_of_the_library(option, allowed):
    assert set(typing.get_args(typing.get_type_hints(TrainOptions)[option])) == allowed


def test_routers_are_those_of_the_library():
    assert set(typing.get_args(typing.get_type_hints(TrainOptions)["router"])) - {"none"} <= set(ROUTERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", 5), "experts"),
        (("--experts", 1), "--experts 1 is not at least 2"),
        (("--k-start", 5), "k_start=5 is not between 1 and 4 experts"),
        (
            ("--schedule", "constant", "--k-start", 2, "--k-end", 3),
            "schedule='constant' has one number of experts",
        ),
        (("--eval-experts", 2, 9), "--eval-experts 9 is not between 1 and 4 experts"),
        (("--epochs", 1), "give --steps or --epochs"),
        (("--shared-experts", 2), "--shared-experts is for --router analytic, got --router random"),
        (("--router", "analytic", "--shared-experts", 4), "--shared-experts 4 is not between 0 and 3 of 4"),
        (
            ("--router", "analytic", "--shared-experts", 3, "--k-start", 2),
            "--k-start 2 is less than the 3 shared",
        ),
        (
            ("--router", "analytic", "--shared-experts", 3, "--eval-experts", 1),
            "--eval-experts 1 is less than",
        ),
        (("--router", "analytic", "--start", "copy"), "--router analytic is for --start carve"),
        (("--router", "analytic", "--partition", "random"), "leave out --partition random"),
        (("--batch-size", 0), "--batch-size 0 is not a positive number"),
        (("--save-steps", 0), "--save-steps 0 is not a positive number"),
        (("--learning-rate", "nan"), "--learning-rate nan is not a finite number"),
        (("--eval-share", 1), "--eval-share 1.0 is not between 0 and 1"),
        (("--lr-scheduler", "steep"), "--lr-scheduler steep is not one of linear, cosine"),
        (("--report-to", "nobody"), "--report-to nobody is not installed"),
        (("--seed", -1), "--seed -1 is not between"),
        (("--max-shard-size", "big"), "--max-shard-size 'big'"),
        (("--drop-fraction", 0.5), "--drop-fraction 0.5 is for --start copy"),
        (("--start", "copy", "--drop-fraction", 2), "drop_fraction=2.0 is not between 0 and 1"),
        (("--start", "copy", "--partition", "coactivation"), "--partition coactivation is for --start carve"),
        (("--start", "copy", "--form", "dense"), "--form dense is for experts that are slices"),
        (("--start", "copy", "--combine", "residual"), "combine='residual' adds whole experts up"),
        (("--router", "none"), "--router none trains the dense model and has no use for --experts"),
        (("--ffn-dropout", 0.1), "--ffn-dropout is for the dense model"),
        (("--load-balance", 0.1), "--load-balance is for --router learned, got --router random"),
        (("--router", "hash", "--center-routers"), "--center-routers is for --router random"),
        (("--router", "hash", "--combine", "residual"), "combine='residual' needs probabilities"),
        (("--form", "stock", "--combine", "uniform"), "--form stock weighs experts by softmax"),
        (("--form", "stock", "--center-routers"), "--form stock has no place for --center-routers"),
        (("--layers", 7), "layers=[7]"),
        (("--seq-len", 500), "more than the model's context of 128"),
        (("--tokenizer", "/no/where"), "'/no/where'"),
    ],
)
def test_options_that_cannot_be(dense, data, tmp_path, capsys, options, message):
    assert train(dense, data, tmp_path / "out", *options) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["--data", "--out"])
def test_options_that_have_to_be(dense, data, tmp_path, capsys, missing):
    given = {"--data": str(data), "--out": str(tmp_path / "out")}
    words = [word for name, value in given.items() if name != missing for word in (name, value)]
    assert cli.main(["train", str(dense), *words]) == 2
    assert f"{missing} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"max_grad_norm": 0.5, "hopes": 1, "dreams": 2}, "names dreams, hopes, which TrainingArguments"),
        ({"learning_rate": 1.0}, "sets learning_rate; give --learning-rate instead"),
        ({"save_strategy": "no"}, "sets save_strategy, which moekit sets itself"),
        ({"optim": "magic"}, "magic"),
        ([1], "holds a list, not a table"),
    ],
)
def test_training_arguments_that_cannot_be(dense, data, tmp_path, capsys, table, message):
    file = tmp_path / "more.json"
    file.write_text(json.dumps(table), encoding="utf-8")
    assert train(dense, data, tmp_path / "out", "--training-arguments", file) == 2
    assert message in capsys.readouterr().err


def test_what_needs_weights(data, tmp_path, capsys):
    config = write_config(tmp_path / "config")
    assert train(config, data, tmp_path / "out", "--start", "copy") == 2
    assert "--start copy needs weights" in capsys.readouterr().err


def test_a_config_elsewhere_needs_a_tokenizer(data, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    text = (write_config(tmp_path / "config") / "config.json").read_text(encoding="utf-8")
    (bare / "config.json").write_text(text, encoding="utf-8")
    assert train(bare / "config.json", data, tmp_path / "out") == 2
    assert "name one with --tokenizer" in capsys.readouterr().err


def test_a_mixture_of_experts_is_refused(checkpoint, data, tmp_path, capsys):
    assert train(checkpoint, data, tmp_path / "out") == 2
    assert "Mixture-of-Experts model already" in capsys.readouterr().err


def test_curve_has_powers_of_two_and_what_was_trained():
    assert default_eval_experts(KSchedule("linear", 8, 16, 16)) == (1, 2, 4, 8, 12, 16)
    assert default_eval_experts(KSchedule("linear", 5, 10, 12)) == (1, 2, 4, 5, 8, 9, 10, 12)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_rows_of_every_kind_of_file(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text(
            '{"question": "a", "text_pair": "b", "label": 10}\n'
            '{"question": "c", "text_pair": "d", "label": 9}\n'
        )
    else:
        comma = {"csv": ",", "tsv": "\t"}[ending]
        rows = [("question", "text_pair", "label"), ("a", "b", "10"), ("c", "d", "9")]
        path.write_text("".join(comma.join(row) + "\n" for row in rows), encoding="utf-8")
    rows = read_labelled_rows(str(path))
    assert [(row.text, row.pair, row.label) for row in rows] == [("a", "b", "10"), ("c", "d", "9")]
    assert label_names(row.label for row in rows) == ("9", "10")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "it needs 'label' and one of text"),
        ('{"text": "a", "label": 0.5}', "has the label 0.5"),
        ('{"text": " ", "label": "x"}', "has an empty text"),
        ('{"text": 3, "label": "x"}', "has a text that is no text"),
        ("[1]", "is a list, not an object"),
        ("{", "cannot be read"),
        ('{"text": "a", "label": "x"}', "there is nothing to tell apart"),
    ],
)
def test_rows_that_cannot_be(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl|tell apart") as raised:
        label_names(row.label for row in read_labelled_rows(str(path)))
    assert message in str(raised.value)


def test_labels_to_evaluate_on_must_be_known(dense, tmp_path, capsys):
    rows, other = write_rows(tmp_path / "rows.jsonl"), tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "prose"}\n', encoding="utf-8")
    assert train(dense, rows, tmp_path / "out", "--task", "classification", "--eval-data", other) == 2
    assert "--eval-data has the labels ['prose']" in capsys.readouterr().err


def test_processes_that_do_not_work_together_are_refused(dense, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_arguments.os, "environ", train_arguments.os.environ | {"WORLD_SIZE": "2"})
    monkeypatch.setattr(train_arguments.TrainingArguments, "distributed_state", None, raising=False)
    with pytest.raises(ValueError, match="2 processes were started and 1 work together"):
        train_arguments.check_processes(
            train_arguments.TrainingArguments.__new__(train_arguments.TrainingArguments)
        )


def test_a_launcher_that_started_one_process_of_several_is_refused(
    dense, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert train(dense, data, tmp_path / "out") == 2
    assert "start them with torchrun" in capsys.readouterr().err


def test_sharding_that_was_left_out_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="asked for DEEPSPEED and gives MULTI_CPU"):
        train_arguments.check_sharding(DistributedType.MULTI_CPU)
    train_arguments.check_sharding(DistributedType.DEEPSPEED)


@pytest.mark.parametrize("names", [("sums", "salad"), ("sums", "other")])
def test_a_model_keeps_the_order_of_its_labels(rows, tmp_path, names):
    """Its head's rows would stand for others; other labels have no order but the alphabet's."""
    model = tiny_llama()
    model.config.id2label = dict(enumerate(names))
    config = write_config(tmp_path / "model", model)
    given = words(config, rows, tmp_path / "out", "--task", "classification")
    job = prepare_training(cli.parse(["train", *given]))
    expected = names if set(names) == {"salad", "sums"} else ("salad", "sums")
    assert job.labels == expected
    assert job.config.id2label == dict(enumerate(expected))
