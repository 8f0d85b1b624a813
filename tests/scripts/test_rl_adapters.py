"""LoRA in `moekit rl`: which maps get adapters, and what is saved of them."""

from typing import Any

import pytest
import torch
from moekit.moe import expert_layers
from moekit.scripts.rl_adapters import with_adapters
from moekit.scripts.rl_options import RlOptions
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from .tiny_checkpoints import tiny_qwen
from .tiny_rl_runs import changed, record, rl, skip_pictures, weights
from .tiny_training import tiny_llama


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    skip_pictures(monkeypatch)


def tiny_gpt() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))  # pyright: ignore


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_qwen, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        # PEFT would take the dense layer's maps for those of the experts of the other one.
        (lambda: tiny_qwen(mlp_only_layers=[0]), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (tiny_llama, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (tiny_gpt, {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_linear_maps_get_adapters_and_experts_stay_as_they_are(make, expected):
    model = with_adapters(make(), RlOptions(model="m", lora=2))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in trained} == expected
    if make is tiny_qwen:
        assert len(expert_layers(model.get_base_model())) == 2


def test_without_a_rank_there_are_none():
    model = tiny_llama()
    assert with_adapters(model, RlOptions(model="m")) is model


@pytest.mark.parametrize("targets", [(), ("--lora-targets", "q_proj", "v_proj", "--lora-alpha", 16)])
def test_adapters_are_beside_what_they_are_merged_into(
    checkpoint, prompts, vowels, tmp_path, targets, capsys, recwarn
):
    from peft import PeftModel

    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, *vowels, "--lora", 4, *targets) == 0
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload().state_dict()
    written: Any = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in written.state_dict().items():
        assert torch.equal(adapted[name], tensor)
    found = changed(checkpoint, out)
    expected = ("q_proj", "v_proj") if targets else ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {name.split(".")[-2] for name in found} == {*expected}
    training = record(out)["training"]
    assert training["parameters"] == tiny_qwen().num_parameters()
    assert training["trained_parameters"] == sum(4 * sum(weights(out)[name].shape) for name in found)
    assert "`adapter/` holds the LoRA adapters" in (out / "README.md").read_text(encoding="utf-8")
    assert "Warning" not in capsys.readouterr().err


def test_the_seed_decides_of_the_adapters(checkpoint, prompts, vowels, tmp_path):
    for name, seed in (("first", 1), ("same", 1), ("other", 2)):
        torch.manual_seed(len(name))
        given = ("--lora", 2, "--steps", 1, "--seed", seed)
        assert rl(checkpoint, prompts, tmp_path / name, *vowels, *given, without=("--steps",)) == 0
    assert changed(tmp_path / "first", tmp_path / "same") == []
    assert changed(tmp_path / "first", tmp_path / "other")


def test_recomputing_activations_under_adapters(checkpoint, prompts, vowels, tmp_path):
    for name, more in (("kept", ()), ("again", ("--gradient-checkpointing",))):
        assert rl(checkpoint, prompts, tmp_path / name, *vowels, "--lora", 2, *more) == 0
    assert changed(tmp_path / "kept", tmp_path / "again") == []
    assert changed(checkpoint, tmp_path / "again")
