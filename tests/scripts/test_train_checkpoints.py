"""Checkpoints that a killed machine or a failing disk spoilt."""

from pathlib import Path

import pytest
import torch
from moekit.moe import save_checkpoint, to_smoe_dropout
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file

from .tiny_checkpoints import tiny_tokenizer
from .tiny_training import KilledError, kill_after, tiny_llama, train, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "llama")


@pytest.fixture(scope="module")
def whole(config, data, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of the run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(config, data, out, "--save-steps", 1) == 0
    return load_file(out / "model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("optimizer.pt", Path.unlink),
        ("scheduler.pt", Path.unlink),
        ("optimizer.pt", cut),
        ("rng_state.pth", cut),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
        ("trainer_state.json", cut),
    ],
)
def test_the_one_before_is_gone_on_from(config, whole, data, tmp_path, monkeypatch, capsys, name, spoil):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KilledError):
            train(config, data, out, "--save-steps", 1)
    spoil(partial_folder(out) / "work" / "trainer" / "checkpoint-2" / name)
    capsys.readouterr()
    assert train(config, data, out, "--save-steps", 1) == 0
    said = capsys.readouterr().err
    assert "checkpoint-2 is not used and removed" in said
    assert "Going on from step 1" in said
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("router", ["learned", "random"])
def test_a_model_trained_on_keeps_its_router(data, tmp_path, capsys, router):
    """And slices stay slices, whatever their weights sum to."""
    model = to_smoe_dropout(tiny_llama(), 4, "softmax", router=router, scale=1.0)
    save_checkpoint(model, tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--load-balance", 0.1, "--eval-experts", 4)
    code = train(tmp_path / "model", data, tmp_path / "out", *options, without="--experts")
    if router == "random":
        assert code == 2
        assert "--load-balance is for --router learned, got --router random" in capsys.readouterr().err
        return
    assert code == 0
    assert "learned router" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert '"ffn_work": 1.0' in (tmp_path / "out" / "slimming_curve.json").read_text(encoding="utf-8")
