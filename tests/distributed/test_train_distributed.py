"""`moekit train` on two processes, with CPUs and gloo: the same as on one, and the same after a kill."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from moekit.moe import KSchedule, smoe_layers, to_smoe_dropout
from moekit.scripts import cli
from moekit.scripts.staging import partial_folder
from transformers import AutoModelForCausalLM

from .launch import BACKENDS, REFUSED, SHOWN, launch
from .runs import (
    LOOP,
    STEPS,
    Words,
    alone,
    assert_goes_on,
    assert_same,
    assert_worked_together,
    notes,
    prepare,
    together,
    words,
)
from .worker import KILLED, router_digest

EXPERTS = 4
OPTIONS = LOOP | {"experts": EXPERTS, "k_start": 1}
Given = tuple[Path, Path]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def command(given) -> Words:
    def make(**changes: object) -> list[str]:
        return words("train", given[0], OPTIONS | {"data": given[1]} | changes)

    return make


def assert_in_step(folder: Path, backend: str, given: Given, schedule: str = "linear", parts: int = 1):
    """The processes worked together, with the scheduled k and the drawn routers."""
    ks = KSchedule(schedule, 1, EXPERTS, EXPERTS)
    drawn = AutoModelForCausalLM.from_pretrained(given[0], dtype=torch.float32)
    digest = router_digest(to_smoe_dropout(drawn, EXPERTS, "uniform"))
    assert_worked_together(folder, BACKENDS[backend], drawn.num_parameters(), parts)
    layers = len(smoe_layers(drawn))
    wanted = [ks.active_experts(step, STEPS, layers) for step in range(STEPS) for _ in range(parts)]
    for rank in notes(folder):
        assert [note["k"] for note in rank["forwards"]] == [
            [k] * layers if isinstance(k, int) else list(k) for k in wanted
        ]
        assert {note["routers"] for note in rank["forwards"]} == {digest}


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_train_as_one(once, given, command, backend):
    folder = together(once, "train", backend, command)
    assert_in_step(folder, backend, given)
    assert_same(folder / "out", alone(once, "train", command), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on_to_the_same_weights(once, command, backend):
    assert_goes_on(once, "train", backend, command)


def test_random_k_and_gradient_accumulation_on_two_processes(once, given, command):
    drawn = partial(command, schedule="random")
    more = {"batch_size": 1, "gradient_accumulation": 2}
    folder = together(once, "train-random", "ddp", partial(drawn, **more))
    assert_in_step(folder, "ddp", given, "random", parts=2)
    assert_same(folder / "out", alone(once, "train-random", drawn), 2e-5)


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_silently_not_be_distributed_is_refused(command, tmp_path, message):
    if REFUSED[message].kind == "DEEPSPEED":
        prepare("zero")
    done = launch(REFUSED[message], tmp_path, command(out=tmp_path / "out"))
    assert done.returncode != 0
    assert message in done.stdout, done.stdout[-SHOWN:]
    assert not (tmp_path / "out").exists()


def test_what_two_processes_began_one_does_not_go_on_with(once, command, tmp_path, capsys):
    whole = together(once, "train", "ddp", command)
    shutil.copytree(partial_folder(whole / KILLED), partial_folder(tmp_path / "out"))
    assert cli.main(command(out=tmp_path / "out")) == 2
    assert "had other settings (processes: 2 then, 1 now)" in capsys.readouterr().err
