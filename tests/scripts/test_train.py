import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moekit.moe import max_logit_difference, set_active_experts, smoe_layers
from moekit.scripts import cli
from moekit.scripts import train as training
from moekit.scripts.staging import partial_folder
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    ViTConfig,
    ViTImageProcessor,
)

from .tiny_training import (
    KilledError,
    kill_after,
    tiny_bert,
    tiny_llama,
    train,
    words,
    write_config,
    write_dense,
    write_rows,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "llama")


@pytest.fixture(scope="module")
def scratch(config, data, tmp_path_factory) -> Path:
    """A full run from scratch, kept for all tests that look at one."""
    out = tmp_path_factory.mktemp("scratch") / "small"
    assert train(config, data, out, "--save-steps", 3, "--eval-steps", 2) == 0
    return out


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_run_leaves_everything_and_nothing_else(scratch):
    assert {path.name for path in scratch.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "run.json",
        "slimming_curve.json",
        "slimming_curve.png",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in scratch.parent.iterdir()] == ["small"]


def test_the_curve_has_every_k_and_the_load_of_every_expert(scratch):
    curve = json.loads((scratch / "slimming_curve.json").read_text(encoding="utf-8"))
    assert [point["active_experts"] for point in curve["points"]] == [1, 2, 3, 4]
    assert [point["ffn_work"] for point in curve["points"]] == [0.25, 0.5, 0.75, 1]
    assert all(point["speed"] > 0 and point["perplexity"] > 1 for point in curve["points"])
    assert curve["points"][-1]["max_load"] == curve["points"][-1]["min_load"] == 1
    assert curve["dense_speed"] > 0
    load = record(scratch)["metrics"]["expert_load"]
    for k in (1, 2, 3, 4):
        for layer in load[str(k)].values():
            assert sum(layer) == k * sum(load["1"]["model.layers.0.mlp"])


def test_the_curve_is_that_of_the_saved_model(scratch, data):
    model = AutoModelForCausalLM.from_pretrained(scratch)
    assert model.config.num_experts_per_tok == 4
    assert model.config.use_cache
    assert [layer.num_experts for layer in smoe_layers(model).values()] == [4, 4]
    assert all(layer.active_experts == 4 for layer in smoe_layers(model).values())


def test_the_log_has_the_schedule_and_the_load(scratch):
    history = record(scratch)["metrics"]["history"]
    steps = {row["step"]: row for row in history if "active_experts" in row}
    assert [steps[2]["active_experts"], steps[4]["active_experts"]] == [2, 4]
    assert steps[4]["max_load"] >= 1 >= steps[4]["min_load"]
    assert sum("eval_cross_entropy" in row for row in history) == 2


def test_the_model_card_says_how_to_load_it(scratch):
    card = (scratch / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/or/hub-id", str(scratch))
    found: dict[str, object] = {}
    exec(code, found)
    assert [layer.active_experts for layer in smoe_layers(found["model"]).values()] == [2, 2]


@pytest.mark.slow
def test_the_recorded_command_repeats_the_run(scratch, tmp_path):
    recorded = shlex.split(record(scratch)["command"])[1:]
    recorded[recorded.index("--out") + 1] = str(tmp_path / "again")
    assert cli.main(recorded) == 0
    assert_same_weights(scratch, tmp_path / "again")


@pytest.mark.parametrize("schedule", ["linear", pytest.param("random", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_weights(config, data, tmp_path, monkeypatch, schedule, capsys):
    options = ("--save-steps", 1, "--schedule", schedule, "--gradient-accumulation", 2)
    assert train(config, data, tmp_path / "whole", *options) == 0
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KilledError):
            train(config, data, out, *options)
    assert not out.exists()
    with monkeypatch.context() as patch:  # once more, while a checkpoint is written
        patch.setattr(Trainer, "_save_rng_state", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            train(config, data, out, *options)
    capsys.readouterr()
    assert train(config, data, out, *options) == 0
    assert "Going on from step 2" in capsys.readouterr().err
    assert_same_weights(tmp_path / "whole", out)
    assert not partial_folder(out).exists()


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_not_trained_further(config, data, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_training_records", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            train(config, data, out)
    last = partial_folder(out) / "work" / "trainer" / "checkpoint-4"
    trained = load_file(last / "model.safetensors")
    assert train(config, data, out) == 0
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(out).items())
    assert record(out)["training"]["steps"] == 4


def test_an_unfinished_run_of_other_options_is_refused(config, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KilledError):
            train(config, data, tmp_path / "out", "--save-steps", 2)
    capsys.readouterr()
    assert train(config, data, tmp_path / "out", "--save-steps", 2, "--seed", 1) == 2
    assert "had other settings (--seed: 0 then, 1 now)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_process_killed_at_a_step_goes_on_to_the_same_weights(config, data, tmp_path, step):
    code = (
        "import os, signal, sys\n"
        "from moekit.scripts import cli, train_progress\n"
        "def die(self, args, state, control, **kwargs):\n"
        "    if state.global_step == int(sys.argv[1]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_progress.TrainingLines.on_step_end = die\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    options = ("--steps", 7, "--save-steps", 3, "--k-start", 1)

    def start(kill_at: int, out: Path) -> int:
        command = [sys.executable, "-c", code, str(kill_at), "train", *words(config, data, out, *options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert start(0, tmp_path / "whole") == 0
    assert start(step, tmp_path / "killed") == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert start(0, tmp_path / "killed") == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_carving_begins_at_the_dense_model(dense, data, tmp_path):
    assert train(dense, data, tmp_path / "out", "--learning-rate", 0, "--seed", 3) == 0
    model, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", dense))
    inputs = {"input_ids": torch.arange(20)[None]}
    assert max_logit_difference(original, model, inputs) < 1e-5
    assert record(tmp_path / "out")["training"]["start"] == "carve"
    assert "uniform" in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_copies_begin_at_the_dense_model_at_every_k(dense, data, tmp_path):
    out = tmp_path / "out"
    assert train(dense, data, out, "--start", "copy", "--learning-rate", 0) == 0
    model, original = (AutoModelForCausalLM.from_pretrained(path) for path in (out, dense))
    for k in (1, 3):
        set_active_experts(model, k)
        assert max_logit_difference(original, model, {"input_ids": torch.arange(20)[None]}) < 1e-5
    points = record(out)["metrics"]["curve"]["points"]
    assert [point["ffn_work"] for point in points] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--center-routers", "--partition", "weights"),
        ("--partition", "coactivation", "--layers", "1"),
        ("--router", "learned", "--load-balance", "0.1", "--combine", "softmax"),
        ("--router", "hash"),
        ("--router", "analytic", "--shared-experts", "1", "--layers", "1"),
        ("--router", "thor", "--k-start", "1", "--k-end", "1", "--schedule", "constant"),
        ("--start", "copy", "--drop-fraction", "0.5", "--bf16"),
        ("--start", "scratch", "--gradient-checkpointing", "--epochs", "0.2"),
    ],
)
def test_what_can_be_asked_for_works(dense, data, tmp_path, options):
    without = "--steps" if "--epochs" in options else ""
    assert train(dense, data, tmp_path / "out", *options, without=without) == 0
    assert smoe_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.slow
def test_the_dense_baseline(dense, data, tmp_path, capsys):
    out = tmp_path / "out"
    given = ("--router", "none", "--ffn-dropout", "0.1")
    assert train(dense, data, out, *given, without="--experts") == 0
    assert "dense" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not smoe_layers(model)
    assert not hasattr(model.config, "quantization_config")
    assert not (out / "slimming_curve.png").exists()


@pytest.mark.slow
def test_forms(dense, data, tmp_path):
    assert train(dense, data, tmp_path / "stock", "--form", "stock") == 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")).__name__ == "MixtralForCausalLM"
    assert train(dense, data, tmp_path / "dense", "--form", "dense") == 0
    assert train(dense, data, tmp_path / "moekit") == 0
    plain, sliced = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "moekit"))
    assert not smoe_layers(plain)
    assert max_logit_difference(sliced, plain, {"input_ids": torch.arange(20)[None]}) < 1e-5
    run = record(tmp_path / "dense")["metrics"]
    assert run["dense_form"]["cross_entropy"] == pytest.approx(run["curve"]["points"][-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_self_slimmable_model_is_trained_further(scratch, data, tmp_path):
    out = tmp_path / "out"
    assert train(scratch, data, out, "--learning-rate", 0, without="--experts") == 0
    assert_same_weights(scratch, out)
    assert record(out)["training"]["start"] == "continue"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classification_of_texts(tmp_path, kind):
    model = write_dense(tmp_path / kind, tiny_bert() if kind == "bert" else tiny_llama())
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    assert train(model, rows, out, "--task", "classification", "--learning-rate", "0.01", "--steps", 30) == 0
    trained = AutoModelForSequenceClassification.from_pretrained(out)
    assert trained.config.id2label == {0: "salad", 1: "sums"}
    assert len(smoe_layers(trained)) == 2
    points = record(out)["metrics"]["curve"]["points"]
    assert points[-1]["accuracy"] > 0.9
    assert "perplexity" not in points[-1]


@pytest.mark.slow
def test_classification_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 190)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(brightness - 40, brightness + 40, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    sizes = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = tmp_path / "vit"
    ViTConfig(hidden_size=32, intermediate_size=48, **sizes).save_pretrained(model)  # pyright: ignore
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
    out = tmp_path / "out"
    given = ("--task", "classification", "--steps", 12, "--learning-rate", "0.01", "--eval-share", "0.2")
    assert train(model, tmp_path / "data", out, *given) == 0
    assert AutoModelForImageClassification.from_pretrained(out).config.id2label == {0: "dark", 1: "light"}
    curve = record(out)["metrics"]["curve"]
    assert curve["speed_unit"] == "pictures/s"
    assert curve["points"][-1]["accuracy"] > 0.9
