"""Which layers are found, in which order, and how a model without any is refused."""

import pytest
import torch
from moekit.moe import UnsupportedModelError, expert_layers
from moekit.moe.discovery import REFUSED
from moekit.moe.families import JetMoeLayer, Llama4Layer, SwitchLayer
from moekit.moe.layer import ExpertLayer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from .families import UNSUPPORTED
from .samples import fresh, merged


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]),
        ("deepseek_v3", ["model.layers.1.mlp", "model.layers.2.mlp"]),
        ("jetmoe", ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]),
        ("gemma4", ["model.layers.0", "model.layers.1", "model.layers.2"]),
        ("switch_transformers", ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"]),
    ],
)
def test_names_in_forward_order(family: str, names: list[str]) -> None:
    model = fresh(family)
    layers = expert_layers(model)
    assert [layer.name for layer in layers] == names
    for layer in layers:
        assert model.get_submodule(layer.name) is layer.block


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3_moe", ExpertLayer),
        ("dbrx", ExpertLayer),
        ("llama4", Llama4Layer),
        ("jetmoe", JetMoeLayer),
        ("switch_transformers", SwitchLayer),
    ],
)
def test_kinds(family: str, kind: type[ExpertLayer]) -> None:
    assert {type(layer) for layer in expert_layers(fresh(family))} == {kind}


def test_shared_experts_and_dense_layers_are_left_alone() -> None:
    model = fresh("deepseek_v3")
    found = {id(p) for layer in expert_layers(model) for p in layer.experts_module.parameters()}
    for name, parameter in model.named_parameters():
        if "shared_experts" in name or "layers.0." in name:
            assert id(parameter) not in found


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4", "jetmoe", "switch_transformers", "longcat_flash"])
@pytest.mark.parametrize("num_kept", [1, 4])
def test_merged_layers_are_found_again(family: str, num_kept: int) -> None:
    model = merged(family, num_kept)
    for layer, original in zip(expert_layers(model), expert_layers(fresh(family)), strict=True):
        assert (layer.name, layer.num_experts, layer.num_physical_experts) == (original.name, 8, num_kept)
        assert layer.top_k == original.top_k
        assert type(layer.router) is type(original.router)


def test_a_wide_router_over_few_groups_is_found() -> None:
    model = merged("qwen3_moe", 2, router="logsumexp")
    for layer in expert_layers(model):
        assert (layer.num_experts, layer.router_mode) == (2, "logsumexp")


def test_looking_twice_gives_the_same_modules() -> None:
    model = fresh("mixtral")
    for one, two in zip(expert_layers(model), expert_layers(model), strict=True):
        assert one.block is two.block
        assert one.router is two.router


def test_the_meta_device_is_enough() -> None:
    model = fresh("qwen3_moe")
    with torch.device("meta"):
        shapes = type(model)(model.config)
    for layer in expert_layers(shapes):
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (8, 2, 32)


def test_dense_models_are_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no routed experts: it is a dense"):
        expert_layers(model)
    assert issubclass(UnsupportedModelError, ValueError)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_refused_families_are_told_why(family: str) -> None:
    reason = REFUSED[family.replace("nllb_moe", "nllb-moe")]
    with pytest.raises(UnsupportedModelError) as error:
        expert_layers(UNSUPPORTED[family]())
    assert str(error.value).endswith(reason)


def test_adapters_on_attention_do_not_hide_the_layers() -> None:
    model = get_peft_model(fresh("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    names = [layer.name for layer in expert_layers(model.get_base_model())]
    assert names == [f"model.layers.{i}.mlp" for i in range(3)]


def test_attention_experts_are_left_alone() -> None:
    """JetMoE's attention experts look like routed ones and are none."""
    model = fresh("jetmoe")
    assert all("attention" not in layer.name for layer in expert_layers(model))
