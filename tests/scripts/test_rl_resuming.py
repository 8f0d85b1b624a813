"""`moekit rl` that is killed, interrupted or refused in the midst, and what the same command makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from moekit.rl import PolicyTrainer
from moekit.scripts import rl as command
from moekit.scripts.staging import partial_folder

from .tiny_rl_runs import (
    changed,
    history,
    prompt_rows,
    record,
    rl,
    rl_killed,
    skip_pictures,
    steps_done,
    write_json_lines,
    write_rewards,
)
from .tiny_training import KilledError

LORA = ("--lora", 2, "--save-steps", 2)
REMEMBERING = ("--algorithm", "epo", "--eval-steps", 2, "--lr-scheduler", "linear", "--warmup", 0.5)
"""A method with a memory, a rate that changes, and an evaluation at a checkpoint."""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def whole(checkpoint, prompts, vowels, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        skip_pictures(patch)
        assert rl(checkpoint, prompts, out, *vowels) == 0
    return out


def assert_same(one: Path, other: Path) -> None:
    """Weights, history and what the run counted are those of the other."""
    assert changed(one, other) == []
    assert history(one) == history(other)
    mine, theirs = record(one), record(other)
    for name in ("training", "data", "warnings"):
        assert mine[name] == theirs[name]
    assert not partial_folder(other).exists()
    assert [path.name for path in other.parent.iterdir()] == [other.name]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_weights(
    checkpoint, prompts, vowels, whole, tmp_path, monkeypatch, capsys, step
):
    out = tmp_path / "out"
    left = rl_killed(monkeypatch, step, checkpoint, prompts, out, *vowels)
    assert not out.exists()
    assert steps_done(left) == ([step - 1] if step > 1 else [])
    capsys.readouterr()
    assert rl(checkpoint, prompts, out, *vowels, *(("--resume",) if step > 1 else ())) == 0
    said = capsys.readouterr().err
    assert ("Going on from step" in said) == (step > 1)
    assert f"step {step - 1} of 3" not in said or step == 1
    assert_same(whole, out)


@pytest.mark.parametrize("given", [LORA, pytest.param(REMEMBERING, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_its_adapters_and_its_memory(
    checkpoint, prompts, vowels, tmp_path, monkeypatch, given
):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert rl(checkpoint, prompts, tmp_path / "whole" / "out", *vowels, *given) == 0
    rl_killed(monkeypatch, 3, checkpoint, prompts, tmp_path / "cut" / "out", *vowels, *given)
    assert rl(checkpoint, prompts, tmp_path / "cut" / "out", *vowels, *given) == 0
    assert_same(tmp_path / "whole" / "out", tmp_path / "cut" / "out")


@pytest.mark.parametrize("place", ["verify_saved", "write_rl_records"])
def test_a_run_killed_when_all_was_learned_only_writes_the_result(
    checkpoint, prompts, vowels, whole, tmp_path, monkeypatch, place
):
    out = tmp_path / "out"

    def die(*_: Any) -> None:
        raise KilledError

    def learn(*_: Any) -> None:
        raise AssertionError("it has learned all already")

    with monkeypatch.context() as patch:
        patch.setattr(command, place, die)
        with pytest.raises(KilledError):
            rl(checkpoint, prompts, out, *vowels)
    assert not out.exists()
    monkeypatch.setattr(PolicyTrainer, "_step", learn)
    assert rl(checkpoint, prompts, out, *vowels) == 0
    assert_same(whole, out)


def test_an_interrupted_run_says_how_to_go_on(
    checkpoint, prompts, vowels, whole, tmp_path, monkeypatch, capsys
):
    out, step = tmp_path / "out", PolicyTrainer._step

    def interrupt(self: PolicyTrainer) -> Any:
        if self.state.step == 2:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_step", interrupt)
        assert rl(checkpoint, prompts, out, *vowels) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("moekit: interrupted; the output was not touched, and the same command goes on")
    assert not out.exists()
    assert rl(checkpoint, prompts, out, *vowels) == 0
    assert_same(whole, out)


@pytest.fixture(scope="module")
def unfinished(checkpoint, prompts, vowels, tmp_path_factory) -> Path:
    """Where a run would have put its result that was killed."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        rl_killed(patch, 2, checkpoint, prompts, out, *vowels)
    return out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("--beta", 0.5), "(--beta: None then, 0.5 now)"),
        (("--algorithm", "rloo"), "(--algorithm: 'grpo' then, 'rloo' now)"),
        (
            ("--set", "epsilon=0.1", "--seed", 1),
            "(--seed: 0 then, 1 now; --set: [] then, ['epsilon=0.1'] now)",
        ),
    ],
)
def test_an_unfinished_run_of_other_options_is_refused(
    checkpoint, prompts, vowels, unfinished, capsys, changes, says
):
    assert rl(checkpoint, prompts, unfinished, *vowels, *changes) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"an unfinished run for '{unfinished}' had other settings {says}; give its command again" in error
    assert steps_done(partial_folder(unfinished) / "work" / "rl") == [1]


def test_what_does_not_change_the_result_may_differ(
    checkpoint, prompts, vowels, whole, unfinished, tmp_path, capsys
):
    shutil.copytree(partial_folder(unfinished), partial_folder(tmp_path / "out"))
    given = ("--logging-steps", 2, "--device", "cpu", "--resume")
    assert rl(checkpoint, prompts, tmp_path / "out", *vowels, *given) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line[:11] for line in lines] == ["step 2 of 3", "step 3 of 3"]
    assert changed(whole, tmp_path / "out") == []
    assert history(whole) == history(tmp_path / "out")


@pytest.mark.parametrize("what", ["prompts", "reward files", "model files"])
def test_other_files_of_the_same_names_are_refused(checkpoint, tmp_path, monkeypatch, capsys, what):
    out, policy = tmp_path / "out", shutil.copytree(checkpoint, tmp_path / "policy")
    data, rewards = write_json_lines(tmp_path / "sums.jsonl", prompt_rows()), write_rewards(tmp_path)
    given = ("--reward", f"{rewards}:vowels", "--eval-prompts", 0)
    rl_killed(monkeypatch, 2, policy, data, out, *given)
    if what == "prompts":
        write_json_lines(data, [row | {"answer": "7"} for row in prompt_rows()])
    elif what == "reward files":
        rewards.write_text(rewards.read_text(encoding="utf-8").replace("aeiou", "aeiouy"), encoding="utf-8")
    else:
        config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
        (policy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}), encoding="utf-8")
    assert rl(policy, data, out, *given) == 2
    assert f"had other settings ({what}: " in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_must_go_on_needs_something_to_go_on_with(
    checkpoint, prompts, vowels, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    says = f"--resume: there is no unfinished run for '{out}' with a checkpoint; leave --resume out to begin"
    assert rl(checkpoint, prompts, out, *vowels, "--resume") == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    rl_killed(monkeypatch, 1, checkpoint, prompts, out, *vowels)
    half = partial_folder(out) / "work" / "rl" / "step-1.partial"
    half.mkdir()
    assert rl(checkpoint, prompts, out, *vowels, "--resume") == 2
    assert says in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(checkpoint, prompts, vowels, unfinished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(partial_folder(unfinished), partial_folder(out))
    step = partial_folder(out) / "work" / "rl" / "step-1"
    (step / "policy_state.json").write_text("{", encoding="utf-8")
    assert rl(checkpoint, prompts, out, *vowels) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"checkpoint '{step}' cannot be read (" in error
    assert "remove this folder to go on from the one before" in error


def test_a_second_run_for_the_same_folder_is_refused(checkpoint, prompts, vowels, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert rl(checkpoint, prompts, whole, *vowels) == 2
    assert f"output folder '{whole}' exists and is not empty; choose another --out" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
