"""A calibration that was interrupted gives what an uninterrupted one gives, bit for bit."""

from pathlib import Path

import pytest
import torch
from moekit.moe.data import TokenBlocks
from moekit.scripts import calibrate as module
from moekit.scripts.calibrate import Calibration, calibrate, read_texts

from .tiny_checkpoints import tiny_qwen, tiny_tokenizer


@pytest.fixture(scope="module")
def blocks(data: Path) -> TokenBlocks:
    sizes = {"seq_len": 32, "calibration_tokens": 1024, "eval_tokens": 64}
    return read_texts(str(data), tiny_tokenizer(), seed=0, **sizes).calibration


def run(blocks: TokenBlocks, folder: Path, sample_inputs: bool = True) -> Calibration:
    return calibrate(tiny_qwen(), blocks, folder, batch_size=2, progress=False, sample_inputs=sample_inputs)


def interrupt(blocks: TokenBlocks, folder: Path, monkeypatch, after: int) -> None:
    """Run until that many steps are kept."""
    original, done = module.record, []

    def record(*args, **kwargs):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "record", record)
        with pytest.raises(KeyboardInterrupt):
            run(blocks, folder)


def equal(actual: Calibration, expected: Calibration) -> None:
    for name, layer in expected.statistics.layers.items():
        for key, tensor in layer.tensors.items():
            assert torch.equal(actual.statistics.layers[name].tensors[key], tensor)
    assert actual.samples is not None
    assert expected.samples is not None
    assert list(actual.samples.layers) == list(expected.samples.layers)
    for name, layer in expected.samples.layers.items():
        mine = actual.samples.layers[name]
        assert mine.num_tokens == layer.num_tokens
        for key in ("positions", "inputs", "expert_ids"):
            assert torch.equal(getattr(mine, key), getattr(layer, key))


def test_an_interruption_changes_nothing(blocks, tmp_path, monkeypatch, caplog):
    whole = run(blocks, tmp_path / "whole")
    assert whole.samples is not None
    assert {layer.num_tokens for layer in whole.samples.layers.values()} == {blocks.num_tokens}
    folder = tmp_path / "part"
    interrupt(blocks, folder, monkeypatch, after=3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration-0003.safetensors",
        "inputs-0003.safetensors",
    ]
    equal(run(blocks, folder), whole)
    assert "going on after step 3 of" in caplog.text


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x" * 40)])
def test_samples_that_were_lost_are_taken_anew(blocks, tmp_path, monkeypatch, caplog, damage):
    whole = run(blocks, tmp_path / "whole")
    folder = tmp_path / "part"
    interrupt(blocks, folder, monkeypatch, after=2)
    damage(folder / "inputs-0002.safetensors")
    equal(run(blocks, folder), whole)
    assert "record them" in caplog.text
    assert "going on" not in caplog.text


def test_samples_are_taken_only_when_asked_for(blocks, tmp_path):
    done = run(blocks, tmp_path, sample_inputs=False)
    assert done.samples is None
    assert [path.name[:11] for path in tmp_path.iterdir()] == ["calibration"]
