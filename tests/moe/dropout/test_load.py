import logging

import pytest
import torch
from moekit.moe import UnsupportedModelError, record_routing
from moekit.moe.dropout.build import smoe_layers
from moekit.moe.dropout.load import ExpertLoadCallback, LoadMeter, RelativeLoad
from transformers import TrainerCallback

from .small_models import llama, losses, smoe, token_ids, trainer


def with_padding():
    ids = token_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("router", ["random", "learned"])
def test_the_counts_are_those_of_a_recording(router):
    model = smoe(router)
    inputs = with_padding()
    with torch.no_grad():
        with record_routing(model) as recorded:
            model.eval()(**inputs)
        with LoadMeter(model) as meter:
            model.train()(**inputs)
            model.eval()(**inputs)
    counts = meter.read_and_reset()
    assert list(counts) == list(smoe_layers(model))
    for name, counts_E in counts.items():
        assert torch.equal(counts_E, recorded.layers[name].counts)
        assert counts_E.sum() == 2 * 13


def test_hash_routers_are_counted_by_their_tables():
    model = smoe("hash").train()
    inputs = with_padding()
    with LoadMeter(model) as meter:
        model(**inputs)
    ids = inputs["input_ids"][inputs["attention_mask"].bool()]
    for name, counts_E in meter.read_and_reset().items():
        chosen = smoe_layers(model)[name].router.table[ids, :2].flatten().long()
        assert torch.equal(counts_E, torch.bincount(chosen, minlength=8))


def test_reading_starts_anew_and_what_was_read_stays():
    model = smoe("random").train()
    meter = LoadMeter(model)
    model(input_ids=token_ids())
    first = next(iter(meter.read_and_reset().values()))
    copy = first.clone()
    model(input_ids=token_ids(1))
    assert torch.equal(first, copy)
    assert next(iter(meter.read_and_reset().values())).sum() == 16
    meter.close()
    model(input_ids=token_ids())
    assert not next(iter(meter.read_and_reset().values())).any()
    assert not any(layer.router._forward_hooks for layer in smoe_layers(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_repeats_of_gradient_checkpointing_do_not_count(reentrant):
    model = smoe("random").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = token_ids()
    with LoadMeter(model) as meter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(counts_E.sum() == 2 * ids.numel() for counts_E in meter.read_and_reset().values())


def test_processes_add_up(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    model = smoe("random").train()
    with LoadMeter(model) as meter:
        model(input_ids=token_ids(3, 8))
    assert all(counts_E.sum() == 2 * 2 * 24 for counts_E in meter.read_and_reset().values())
    assert not any(counts_E.any() for counts_E in meter.read_and_reset().values())


def test_the_load_is_relative_to_the_mean():
    assert RelativeLoad.of(torch.tensor([6, 2, 0, 0])) == RelativeLoad(3.0, 0.0)
    assert RelativeLoad.of(torch.tensor([5, 5])) == RelativeLoad(1.0, 1.0)


class Listener(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(dict(logs))


def test_the_logs_tell_the_load_and_a_dead_expert_is_warned_of_once(tmp_path, caplog):
    model = smoe("random", 1)
    second = list(smoe_layers(model).values())[1].router
    second.bias[3] = -1e6
    listener = Listener()
    run = trainer(
        model, tmp_path, callbacks=[ExpertLoadCallback(), listener], eval_strategy="steps", eval_steps=1
    )
    with caplog.at_level(logging.WARNING, logger="moekit.moe.dropout.load"):
        run.train()
    for records in (listener.heard, run.state.log_history):
        told = [record for record in records if "loss" in record]
        assert len(told) == 3
        assert all(record["dead_experts"] >= 1 and record["min_load"] == 0 for record in told)
        assert all(record["max_load"] > 1 for record in told)
        assert not any("max_load" in record for record in records if "loss" not in record)
    warnings = [r.getMessage() for r in caplog.records if r.name == "moekit.moe.dropout.load"]
    assert len(warnings) == 1
    assert "no token reached the experts" in warnings[0]
    assert not any(layer.router._forward_hooks for layer in smoe_layers(model).values())


def test_all_experts_active_are_in_balance_and_the_training_is_as_without(tmp_path):
    measured = trainer(smoe("random", 8), tmp_path, callbacks=[ExpertLoadCallback()])
    measured.train()
    told = [record for record in measured.state.log_history if "loss" in record]
    assert {(r["max_load"], r["min_load"], r["dead_experts"]) for r in told} == {(1.0, 1.0, 0)}
    plain = trainer(smoe("random", 8), tmp_path)
    plain.train()
    assert losses(plain) == losses(measured)


def test_a_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="no SMoE-Dropout layers"):
        LoadMeter(llama())
