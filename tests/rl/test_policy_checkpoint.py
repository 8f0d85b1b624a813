"""Checkpoints of a policy in training that are damaged, or must not be written."""

import json
import logging
import shutil

import pytest
import torch
from moekit.rl import NonFiniteError
from moekit.rl import checkpoint as checkpoints

from .tiny_rl import tiny_policy, tiny_trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_trainer(folder, steps=1).train()
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "policy_state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "noise"])
def test_a_damaged_checkpoint_is_refused(tmp_path, saved, name, damage):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "step-1" / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\x80\x02" * 99}[damage])
    with pytest.raises(ValueError, match=r"step-1' cannot be read .* remove this folder"):
        tiny_trainer(tmp_path / "run", steps=2).train()


@pytest.mark.parametrize("change", [{"step": -1}, {"step": 3}, {"updates": "1"}, {"method": []}, {"more": 1}])
def test_a_state_that_cannot_be_is_refused(tmp_path, saved, change):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "step-1" / "policy_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="cannot be read"):
        tiny_trainer(tmp_path / "run", steps=2).train()


def test_a_checkpoint_of_another_policy_is_refused(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "run")
    with pytest.raises(ValueError, match="of another policy"):
        tiny_trainer(tmp_path / "run", steps=2, model=tiny_policy(hidden_size=32)).train()


def test_the_one_before_serves_if_the_last_is_removed(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=2)
    trainer.save = lambda: checkpoints.save(tmp_path, trainer.accelerator, trainer.state, keep=2)
    trainer.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-2", "step-1"]
    shutil.rmtree(tmp_path / "step-2")
    resumed = tiny_trainer(tmp_path, steps=2)
    assert resumed.train().step == 2
    assert [row["step"] for row in resumed.history.read()] == [1, 2]


def test_only_the_newest_stays_and_no_half_of_one(tmp_path):
    (tmp_path / "step-7.partial").mkdir()
    (tmp_path / "step-9.partial").mkdir()
    tiny_trainer(tmp_path).train()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-3"]


def test_a_step_is_saved_once(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.train()
    before = (tmp_path / "step-1" / "model.safetensors").stat()
    trainer.save()
    assert (tmp_path / "step-1" / "model.safetensors").stat() == before


def test_tied_weights_are_saved_without_a_word(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, steps=1)
        trainer.train()
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    assert "Removed shared tensor" not in caplog.text
    logger = logging.getLogger("accelerate.utils.other")
    assert logger.filters == []


def poison(trainer, step, value):
    """The gradient of a step."""
    clip = trainer.accelerator.clip_grad_norm_

    def poisoned(parameters, limit):
        parameters = list(parameters)
        if trainer.state.step == step:
            parameters[0].grad[0, 0] = value
        return clip(parameters, limit)

    trainer.accelerator.clip_grad_norm_ = poisoned


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_none_stops_the_run(tmp_path, value, max_grad_norm):
    trainer = tiny_trainer(tmp_path, max_grad_norm=max_grad_norm)
    poison(trainer, 1, value)
    with pytest.raises(NonFiniteError, match=r"gradient's norm is (nan|inf); the last checkpoint is sound"):
        trainer.train()
    assert isinstance(NonFiniteError(), ValueError)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]
    resumed = tiny_trainer(tmp_path)
    assert resumed.train().step == 3
    assert all(parameter.isfinite().all() for parameter in resumed.model.parameters())


def test_the_same_trainer_forgets_the_gradient_that_was_none(tmp_path):
    trainer = tiny_trainer(tmp_path)
    clip = trainer.accelerator.clip_grad_norm_
    poison(trainer, 1, float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.train()
    trainer.accelerator.clip_grad_norm_ = clip
    assert trainer.train().step == 3


def test_weights_that_are_none_are_not_saved(tmp_path):
    trainer = tiny_trainer(tmp_path)
    optimizer = trainer.learner.updater.optimizer
    step = optimizer.step

    def spoil():
        step()
        if trainer.state.step == 1:
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = float("inf")

    optimizer.step = spoil
    with pytest.raises(NonFiniteError, match=r"weights hold NaN or infinity \(model\.model\.embed_tokens"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]
