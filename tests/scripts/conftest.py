from pathlib import Path

import pytest

from .tiny_checkpoints import write_checkpoint, write_data


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; tests that damage one copy it first."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-moe")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for it."""
    return write_data(tmp_path_factory.mktemp("data") / "text.jsonl")
