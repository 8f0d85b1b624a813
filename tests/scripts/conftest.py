from pathlib import Path
from typing import Any

import pytest
from moekit.scripts import rl as rl_command

from .tiny_checkpoints import write_checkpoint, write_data
from .tiny_distillation import tiny_judge
from .tiny_rl_runs import prompt_rows, rl, write_json_lines, write_rewards
from .tiny_training import write_dense, write_rows


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; tests that damage one copy it first."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-moe")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for it."""
    return write_data(tmp_path_factory.mktemp("data") / "text.jsonl")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained dense model."""
    return write_dense(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def judge(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned them."""
    return write_checkpoint(tmp_path_factory.mktemp("judge") / "bert", tiny_judge(rows, ("salad", "sums")))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums to complete."""
    return write_json_lines(tmp_path_factory.mktemp("prompts") / "sums.jsonl", prompt_rows())


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own rewards."""
    return write_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="session")
def vowels(reward_file: Path) -> tuple[str, ...]:
    """One that a random policy can learn."""
    return "--reward", f"{reward_file}:vowels", "--pass-at", "0.1"


@pytest.fixture
def rl_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `moekit rl` as it has to be refused in one line, before weights are read, and to leave nothing."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(rl_command, "load_trained", read)

    def run(policy: object, data: object, *more: object, says: str, without: tuple[str, ...] = ()) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert rl(policy, data, tmp_path / "out", *more, without=without) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("moekit: error: ")
        assert says in error
        assert sorted(tmp_path.rglob("*")) == before

    return run
