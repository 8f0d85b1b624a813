"""Several processes calibrate together, to the plan and the weights of one."""

import json
from pathlib import Path

import pytest
import torch
from moekit.moe.statistics import RoutingStatistics
from moekit.scripts import cli
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file

from ..scripts.tiny_checkpoints import TEXT_OPTIONS, tiny_qwen, write_checkpoint, write_data
from .launch import BACKENDS, SHOWN, launch

WAYS = {
    "m-smoe": (),
    "hc-smoe": ("--method", "hc-smoe"),
    "ream": ("--method", "ream"),
    "by sensitivity": ("--method", "ean", "--grouping", "sensitivity"),
    "streamed": ("--method", "ream", "--stream"),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("given")
    return write_checkpoint(folder / "qwen", tiny_qwen()), write_data(folder / "text.jsonl")


def words(given: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    model, data = given
    options = [*TEXT_OPTIONS, "--data", data, "--experts", 4, "--out", out, "--no-report", *more]
    return ["compress", *map(str, [model, *options])]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def plan(out: Path) -> dict:
    """As written, numbers to ten digits: sums of floats depend on their order in the last ones."""
    text = (out / "plan.json").read_text(encoding="utf-8")
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.10g}"))


def assert_equal(out: Path, other: Path, tolerance: float) -> None:
    mine, theirs = weights(out), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_plan_of_one(given, way, tmp_path):
    assert cli.main(words(given, tmp_path / "alone", *WAYS[way])) == 0
    done = launch(BACKENDS["ddp"], tmp_path, words(given, tmp_path / "together", *WAYS[way]))
    assert done.returncode == 0, done.stdout[-SHOWN:]
    assert done.stdout.count("model:  ") == 1  # one speaks
    assert plan(tmp_path / "alone") == plan(tmp_path / "together")
    assert_equal(tmp_path / "alone", tmp_path / "together", tolerance=1e-6)
    kept = [RoutingStatistics.load(tmp_path / name / "calibration") for name in ("alone", "together")]
    for name, layer in kept[0].layers.items():
        assert layer.num_tokens == kept[1].layers[name].num_tokens
        torch.testing.assert_close(layer.logit_gram, kept[1].layers[name].logit_gram, rtol=1e-12, atol=0)
    assert not partial_folder(tmp_path / "together").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["router", "kd"])
def test_two_processes_heal_as_one_with_batches_twice_as_large(given, mode, tmp_path):
    options = ("--heal", mode, "--heal-learning-rate", 3e-3, "--heal-steps", 6, "--method", "reap")
    assert cli.main(words(given, tmp_path / "alone", *options, "--batch-size", 4)) == 0
    command = words(given, tmp_path / "together", *options, "--batch-size", 2)
    done = launch(BACKENDS["ddp"], tmp_path, command)
    assert done.returncode == 0, done.stdout[-SHOWN:]
    assert_equal(tmp_path / "alone", tmp_path / "together", tolerance=2e-5)
    run = json.loads((tmp_path / "together" / "run.json").read_text(encoding="utf-8"))
    assert run["healing"]["steps"] == 6


@pytest.mark.slow
def test_a_fault_of_one_ends_all(given, tmp_path):
    command = words(given, tmp_path / "out", "--batch-size", 1000)
    done = launch(BACKENDS["ddp"], tmp_path, command)
    assert done.returncode != 0
    assert "2 processes were started for 1 batches of calibration text" in done.stdout
    assert not partial_folder(tmp_path / "out").exists()


def test_sharding_is_refused(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert cli.main(words(given, tmp_path / "out")) == 2
    assert "holds a whole model in each process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
