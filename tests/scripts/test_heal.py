"""Healing within `moekit compress`."""

import json
from pathlib import Path

import pytest
import torch
from moekit.scripts import cli
from moekit.scripts.train_progress import TrainingLines
from safetensors.torch import load_file

from .tiny_checkpoints import TEXT_OPTIONS, tiny_switch, write_checkpoint


def compress(model: Path, data: Path, out: Path, *more: object) -> int:
    given = ["--data", str(data), "--experts", "4", "--out", str(out)]
    return cli.main(["compress", str(model), *TEXT_OPTIONS, *given, *map(str, more)])


@pytest.fixture(scope="module")
def one_shot(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    assert compress(checkpoint, data, out, "--no-report") == 0
    return load_file(out / "model.safetensors")


def facts(out: Path) -> dict:
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def stages(run: dict) -> tuple[dict, dict]:
    """Measurements before and after healing."""
    return run["metrics"]["one_shot"], run["metrics"]


def test_routers_alone_are_healed(checkpoint, data, tmp_path, one_shot, capsys):
    out = tmp_path / "out"
    assert compress(checkpoint, data, out, "--heal", "router", "--heal-learning-rate", 0.01) == 0
    healed = load_file(out / "model.safetensors")
    assert healed.keys() == one_shot.keys()
    changed = {name for name in healed if not torch.equal(healed[name], one_shot[name])}
    assert changed
    assert all(name.endswith("mlp.gate.weight") for name in changed)
    run = facts(out)
    assert run["healing"]["mode"] == "router"
    assert run["healing"]["trained_parameters"] == sum(healed[name].numel() for name in changed)
    before, after = (
        run["metrics"][key]["fidelity"] if key else run["metrics"]["fidelity"] for key in ("one_shot", "")
    )
    assert after["overall"]["kl"]["value"] < before["overall"]["kl"]["value"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What healing has done" in page
    assert "one-shot" in capsys.readouterr().out


def test_a_single_step_heals(checkpoint, data, tmp_path, one_shot):
    options = ("--no-report", "--heal", "router", "--heal-steps", 1, "--heal-learning-rate", 1e-2)
    assert compress(checkpoint, data, tmp_path / "out", *options) == 0
    healed = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(healed[name], one_shot[name]) for name in healed)


def test_all_weights_are_healed_and_text_is_learned(checkpoint, data, tmp_path, one_shot):
    out = tmp_path / "out"
    options = ("--heal", "kd", "--heal-steps", 30, "--heal-learning-rate", 0.01)
    assert compress(checkpoint, data, out, *options) == 0
    healed = load_file(out / "model.safetensors")
    assert any("experts" in name and not torch.equal(healed[name], one_shot[name]) for name in healed)
    run = facts(out)
    assert run["healing"]["steps"] == 30
    overall = (found["fidelity"]["overall"] for found in stages(run))
    before, after = (found["perplexity_compressed"]["value"] for found in overall)
    assert after < 0.9 * before


def test_an_interrupted_healing_goes_on_to_the_same_bytes(checkpoint, data, tmp_path, monkeypatch):
    options = ("--heal", "kd", "--heal-steps", 12, "--heal-learning-rate", 0.01, "--no-report")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert compress(checkpoint, data, whole, *options) == 0

    class Killed(TrainingLines):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise ValueError("killed")

    monkeypatch.setattr("moekit.scripts.heal.TrainingLines", Killed)
    assert compress(checkpoint, data, broken, *options) == 2
    assert not broken.exists()
    monkeypatch.undo()
    assert compress(checkpoint, data, broken, *options) == 0
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


def test_weights_keep_their_type(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    options = ("--heal", "router", "--heal-steps", 2, "--no-report", "--dtype", "bfloat16")
    assert compress(checkpoint, data, out, *options) == 0
    assert {
        tensor.dtype for tensor in load_file(out / "model.safetensors").values() if tensor.is_floating_point()
    } == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--heal", "kd", "--heal-steps", 0), "--heal-steps 0 must be at least 1"),
        (("--heal-steps", 5), "--heal-steps is of healing; add --heal router or --heal kd"),
        (("--heal", "kd", "--heal-learning-rate", -1.0), "--heal-learning-rate -1.0 must be above 0"),
        (("--heal", "router", "--plan-only"), "--heal trains the result, and --plan-only makes none"),
    ],
)
def test_what_cannot_be(checkpoint, data, tmp_path, capsys, words, message):
    assert compress(checkpoint, data, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_data(checkpoint, tmp_path, capsys):
    words = [
        "--method",
        "aimer",
        "--experts",
        "4",
        "--heal",
        "kd",
        "--no-report",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(["compress", str(checkpoint), *words]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_encoder_decoders(data, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "switch", tiny_switch())
    assert compress(model, data, tmp_path / "out", "--heal", "router") == 2
    assert "not encoder-decoders" in capsys.readouterr().err


LOW_RANK = ("--rank", 2, "--sparse-rows", 0.25, "--heal", "kd", "--heal-steps", 12, "--no-report")


def test_rows_are_pruned_while_healing(checkpoint, data, tmp_path, monkeypatch):
    whole, broken, at_once = tmp_path / "whole", tmp_path / "broken", tmp_path / "at once"
    assert compress(checkpoint, data, at_once, *LOW_RANK) == 0
    assert compress(checkpoint, data, whole, *LOW_RANK, "--prune-rows") == 0
    pruned, plain = (load_file(out / "model.safetensors") for out in (whole, at_once))
    assert {name: value.shape for name, value in pruned.items()} == {n: v.shape for n, v in plain.items()}
    index = [name for name in pruned if name.endswith("row_index")]
    assert index
    assert any(not torch.equal(pruned[name], plain[name]) for name in index)

    class Killed(TrainingLines):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise ValueError("killed")

    monkeypatch.setattr("moekit.scripts.heal.TrainingLines", Killed)
    assert compress(checkpoint, data, broken, *LOW_RANK, "--prune-rows") == 2
    monkeypatch.undo()
    assert compress(checkpoint, data, broken, *LOW_RANK, "--prune-rows") == 0
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


def test_one_shot_is_of_the_rows_that_stay(checkpoint, data, tmp_path):
    """And not of all rows, which healing begins with."""
    words = [word for word in LOW_RANK if word != "--no-report"]
    assert compress(checkpoint, data, tmp_path / "plain", *words[:4]) == 0
    assert compress(checkpoint, data, tmp_path / "pruned", *words, "--prune-rows") == 0
    expected, (found, _) = facts(tmp_path / "plain")["metrics"], stages(facts(tmp_path / "pruned"))
    assert found["fidelity"] == expected["fidelity"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--heal", "kd"), "--prune-rows has nothing to prune: got no rank"),
        (("--heal", "kd", "--rank", 2, "--sparse-rows", 1), "got --sparse-rows 1"),
        (("--heal", "router", "--rank", 2), "--prune-rows goes with --heal kd"),
        (("--heal", "kd", "--rank", 2, "--method", "ream"), "say --sequential off"),
    ],
)
def test_rows_that_cannot_be_pruned(checkpoint, data, tmp_path, capsys, words, message):
    assert compress(checkpoint, data, tmp_path / "out", "--prune-rows", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
