from pathlib import Path

import pytest

from .tiny_checkpoints import write_checkpoint, write_data
from .tiny_distillation import tiny_judge
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
