"""`moekit train` on two processes, with CPUs and gloo: the same as on one, and the same after a kill."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moekit.moe import KSchedule, smoe_layers, to_smoe_dropout
from moekit.scripts import cli
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import Once
from .launch import BACKENDS, REFUSED, SHOWN, Backend, build_extension, launch
from .worker import KILLED, router_digest

EXPERTS, STEPS, SAVED_AT = 4, 6, 3
OPTIONS = {
    "--experts": EXPERTS,
    "--k-start": 1,
    "--steps": STEPS,
    "--save-steps": SAVED_AT,
    "--logging-steps": 1,
    "--seq-len": 32,
    "--batch-size": 2,
    "--learning-rate": 3e-3,
    "--weight-decay": 0.1,
    "--eval-share": 0.1,
}
Given = tuple[Path, Path]

pytestmark = pytest.mark.slow


def command(given: Given, out: Path, **changes: object) -> list[str]:
    """Words of `moekit train`."""
    options = OPTIONS | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return ["train", str(given[0]), "--data", str(given[1]), "--out", str(out)] + [
        word for name, value in options.items() for word in (name, str(value))
    ]


def alone(once: Once, given: Given, **changes: object) -> Path:
    """The result of one process with as many rows in a step."""
    name = "-".join(["alone", *map(str, changes.values())])

    def fill(folder: Path) -> None:
        assert cli.main(command(given, folder / "out", batch_size=4, **changes)) == 0

    return once(name, fill) / "out"


def prepare(name: str) -> None:
    """Skip what is not installed, and compile what is not compiled."""
    if name.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed: pip install 'moekit[deepspeed]'")
        build_extension()


def together(once: Once, given: Given, name: str, **changes: object) -> Path:
    """The folder of a finished run on two processes: result, notes, and the hidden folder as if killed."""
    prepare(name)

    def fill(folder: Path) -> None:
        start(name, folder, command(given, folder / "out", **changes))

    return once("-".join([name, *map(str, changes.values())]), fill)


def start(name: str, folder: Path, words: list[str]) -> str:
    """Run a command on two processes; returns what they said."""
    done = launch(BACKENDS[name], folder, words)
    assert done.returncode == 0, done.stdout[-SHOWN:]
    return done.stdout


def notes(folder: Path) -> list[dict[str, Any]]:
    """Of each process."""
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def run_file(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def numbers(out: Path) -> list[float]:
    """Loss of every step, then the held-out losses."""
    metrics = run_file(out)["metrics"]
    points = metrics["curve"]["points"]
    return [row["loss"] for row in metrics["history"] if "loss" in row] + [point["loss"] for point in points]


def assert_same(out: Path, other: Path, tolerance: float) -> None:
    """Losses to the fourth decimal and weights to a tolerance; with none, both to the last bit."""
    assert numbers(out) == pytest.approx(numbers(other), rel=0, abs=5e-5 if tolerance else 0)
    mine, theirs = (load_file(path / "model.safetensors") for path in (out, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance)


def assert_in_step(folder: Path, backend: Backend, given: Given, schedule: str = "linear", parts: int = 1):
    """What the processes noted: that they worked together, with the scheduled k and the drawn routers."""
    ranks = notes(folder)
    ks = KSchedule(schedule, 1, EXPERTS, EXPERTS)
    drawn = AutoModelForCausalLM.from_pretrained(given[0], dtype=torch.float32)
    digest = router_digest(to_smoe_dropout(drawn, EXPERTS, "uniform"))
    layers = len(smoe_layers(drawn))
    wanted = [ks.active_experts(step, STEPS, layers) for step in range(STEPS) for _ in range(parts)]
    for rank in ranks:
        wanted_facts = {"kind": backend.kind, "world": 2, "backend": "gloo"}
        wanted_facts |= {"zero_stage": backend.zero_stage, "fsdp_version": backend.fsdp_version}
        assert {name: rank[name] for name in wanted_facts} == wanted_facts
        held = rank["local_parameters"] / drawn.num_parameters()
        assert held == pytest.approx(0.5, abs=0.02) if backend.is_divided else held == 1
        assert [note["step"] for note in rank["forwards"]] == [s for s in range(STEPS) for _ in range(parts)]
        assert [note["k"] for note in rank["forwards"]] == [
            [k] * layers if isinstance(k, int) else list(k) for k in wanted
        ]
        assert {note["routers"] for note in rank["forwards"]} == {digest}
    rows = [note["rows"] for rank in ranks for note in rank["forwards"]]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("name", BACKENDS)
def test_two_processes_train_as_one(once, given, name):
    folder = together(once, given, name)
    assert_in_step(folder, BACKENDS[name], given)
    assert_same(folder / "out", alone(once, given), 2e-5)
    training = run_file(folder / "out")["training"]
    assert (training["processes"], training["steps"]) == (2, STEPS)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_killed_run_goes_on_to_the_same_weights(once, given, name):
    """Killed two steps after a checkpoint."""
    whole = together(once, given, name)
    folder = once(f"{name}-resumed", lambda folder: None)
    shutil.copytree(partial_folder(whole / KILLED), partial_folder(folder / "out"))
    said = start(name, folder, command(given, folder / "out"))
    assert f"Going on from step {SAVED_AT}" in said
    for rank in notes(folder):
        assert [note["step"] for note in rank["forwards"]] == list(range(SAVED_AT, STEPS))
    assert_same(folder / "out", whole / "out", 0.0)


def test_random_k_and_gradient_accumulation_on_two_processes(once, given):
    more = {"schedule": "random", "gradient_accumulation": 2}
    folder = together(once, given, "ddp", batch_size=1, **more)
    assert_in_step(folder, BACKENDS["ddp"], given, "random", parts=2)
    assert_same(folder / "out", alone(once, given, **{"schedule": "random"}), 2e-5)


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_silently_not_be_distributed_is_refused(given, tmp_path, message):
    if REFUSED[message].kind == "DEEPSPEED":
        prepare("zero")
    done = launch(REFUSED[message], tmp_path, command(given, tmp_path / "out"))
    assert done.returncode != 0
    assert message in done.stdout, done.stdout[-SHOWN:]
    assert not (tmp_path / "out").exists()


def test_what_two_processes_began_one_does_not_go_on_with(once, given, tmp_path, capsys):
    whole = together(once, given, "ddp")
    shutil.copytree(partial_folder(whole / KILLED), partial_folder(tmp_path / "out"))
    assert cli.main(command(given, tmp_path / "out")) == 2
    assert "had other settings (processes: 2 then, 1 now)" in capsys.readouterr().err
