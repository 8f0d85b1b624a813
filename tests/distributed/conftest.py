"""What several tests look at is made once, however many workers pytest has."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from ..scripts.tiny_checkpoints import write_data
from ..scripts.tiny_training import tiny_llama, write_dense

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Once:
    """Makes a folder by name, or waits for the worker that makes it."""
    base = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = base / "distributed" / name
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "made").exists():
                fill(folder)
                (folder / "made").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def given(once) -> tuple[Path, Path]:
    """A dense model that draws nothing in training, as each process would draw other numbers; and text."""

    def fill(folder: Path) -> None:
        write_dense(folder / "llama", tiny_llama(attention_dropout=0.0))
        write_data(folder / "text.jsonl")

    folder = once("given", fill)
    return folder / "llama", folder / "text.jsonl"
