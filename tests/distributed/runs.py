"""Runs of a command on one process and on two: started, read and compared."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from moekit.scripts import cli
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file

from .conftest import Once
from .launch import BACKENDS, SHOWN, Backend, build_extension, launch
from .worker import KILLED

STEPS, SAVED_AT = 6, 3
ALONE, TOGETHER = 4, 2
"""Rows at a time, of one process and of each of two."""
LOOP = {
    "steps": STEPS,
    "save_steps": SAVED_AT,
    "logging_steps": 1,
    "seq_len": 32,
    "batch_size": TOGETHER,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "eval_share": 0.1,
}
LOGGED = ("loss", "task", "distillation", "expert_load", "alignment_factor")
"""What is compared of every step, where there is such a thing."""
Words = Callable[..., list[str]]
"""Makes a command of ``out``, with changes of its options by name."""


def words(command: str, model: Path, options: Mapping[str, object]) -> list[str]:
    """A command with a model and options; True is a flag."""
    found = [command, str(model)]
    for name, value in options.items():
        found += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return found


def alone(once: Once, name: str, make: Words, **changes: object) -> Path:
    """The result of one process."""

    def fill(folder: Path) -> None:
        assert cli.main(make(out=folder / "out", **{"batch_size": ALONE, **changes})) == 0

    return once(f"{name}-alone", fill) / "out"


def prepare(backend: str) -> None:
    """Skip what is not installed, and compile what is not compiled."""
    if backend.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed: pip install 'moekit[deepspeed]'")
        build_extension()


def together(once: Once, name: str, backend: str, make: Words) -> Path:
    """The folder of a finished run on two processes: result, notes, and the hidden folder as if killed."""
    prepare(backend)
    return once(f"{name}-{backend}", lambda folder: start(backend, folder, make(out=folder / "out")))


def start(backend: str, folder: Path, command: list[str]) -> str:
    """Run a command on two processes; returns what they said."""
    done = launch(BACKENDS[backend], folder, command)
    assert done.returncode == 0, done.stdout[-SHOWN:]
    return done.stdout


def assert_goes_on(once: Once, name: str, backend: str, make: Words) -> None:
    """Killed two steps after a checkpoint, a run ends with the same losses and weights to the last bit."""
    whole = together(once, name, backend, make)
    folder = once(f"{name}-{backend}-resumed", lambda folder: None)
    shutil.copytree(partial_folder(whole / KILLED), partial_folder(folder / "out"))
    said = start(backend, folder, make(out=folder / "out"))
    assert f"Going on from step {SAVED_AT}" in said
    for rank in notes(folder):
        assert [note["step"] for note in rank["forwards"]] == list(range(SAVED_AT, STEPS))
    assert_same(folder / "out", whole / "out", 0.0)


def notes(folder: Path) -> list[dict[str, Any]]:
    """Of each process."""
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def run_file(out: Path) -> dict[str, Any]:
    """What the run says of itself."""
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def logged(out: Path, name: str) -> list[float]:
    """What was logged of every step where there was such a thing."""
    return [row[name] for row in run_file(out)["metrics"]["history"] if name in row]


def numbers(out: Path) -> list[float]:
    """Losses of every step and their parts, then losses on held-out examples."""
    metrics = run_file(out)["metrics"]
    points = metrics["curve"]["points"] if "curve" in metrics else [metrics["after"]]
    held_out = [point[name] for point in points for name in ("loss", "cross_entropy") if name in point]
    return [number for name in LOGGED for number in logged(out, name)] + held_out


def assert_same(out: Path, other: Path, tolerance: float) -> None:
    """Losses to the fourth decimal and weights to a tolerance; with none, both to the last bit."""
    assert numbers(out) == pytest.approx(numbers(other), rel=0, abs=5e-5 if tolerance else 0)
    mine, theirs = (load_file(path / "model.safetensors") for path in (out, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance)


def assert_worked_together(folder: Path, backend: Backend, num_parameters: int, parts: int = 1) -> None:
    """What the processes noted: that they knew of each other, and read different rows."""
    ranks = notes(folder)
    for rank in ranks:
        wanted = {"kind": backend.kind, "world": 2, "backend": "gloo"}
        wanted |= {"zero_stage": backend.zero_stage, "fsdp_version": backend.fsdp_version}
        assert {name: rank[name] for name in wanted} == wanted
        held = rank["local_parameters"] / num_parameters
        assert held == pytest.approx(0.5, abs=0.02) if backend.is_divided else held == 1
        assert [note["step"] for note in rank["forwards"]] == [s for s in range(STEPS) for _ in range(parts)]
    rows = [note["rows"] for rank in ranks for note in rank["forwards"]]
    assert len(set(rows)) == len(rows)
    training = run_file(folder / "out")["training"]
    assert (training["processes"], training["steps"]) == (2, STEPS)
