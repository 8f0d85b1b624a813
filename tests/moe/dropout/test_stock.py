import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from moekit.moe import (
    UnsupportedModelError,
    max_logit_difference,
    save_checkpoint,
    set_active_experts,
    smoe_layers,
    to_smoe_dropout,
    to_stock,
)
from moekit.moe.dropout.stock import RECIPES
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..tiny_models import Family

WIDE = {"intermediate_size": 64}  # a quarter of which fills 16 bytes

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
SLIDES_IN_SOME = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
SLIDES_IN_ALL = SLIDES_IN_SOME | {"max_window_layers": 0}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": (
        "Llama",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "pretraining_tp": 2},
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 3}),
    "granite": ("Granite", MULTIPLIERS | {"attention_bias": True}),
    "qwen2": ("Qwen2", SLIDES_IN_SOME),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3-bias": ("Qwen3", SLIDES_IN_ALL | {"attention_bias": True}),
    "qwen3_5": (
        "Qwen3_5Text",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
}


def dense(config: str, overrides: dict[str, Any] | None = None) -> PreTrainedModel:
    return Family(f"{config}Config", f"{config.removesuffix('Text')}ForCausalLM", WIDE | (overrides or {}))()


def convert(kind: str, **options) -> PreTrainedModel:
    return to_smoe_dropout(dense(*MODELS[kind]), 4, **({"logit_std": 1.0, "partition": "random"} | options))


def inputs() -> dict[str, torch.Tensor]:
    """Longer than the sliding windows."""
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_every_family_has_a_tiny_model():
    assert {dense(*model).config.model_type for model in MODELS.values()} == set(RECIPES)


@pytest.mark.parametrize("kind", MODELS)
def test_the_stock_class_computes_the_same_for_every_k(tmp_path, kind):
    model = convert(kind)
    stock = to_stock(model)
    assert stock.config.architectures == [type(stock).__name__]
    assert not smoe_layers(stock)
    save_checkpoint(stock, tmp_path)
    assert "moekit" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    for k in (1, 2, 3, 4):
        set_active_experts(model, k)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=k)
        assert type(loaded) is type(stock)
        assert loaded.config.num_experts_per_tok == k
        assert max_logit_difference(model, loaded, inputs()) < 1e-5
        assert max_logit_difference(model, to_stock(model), inputs()) < 1e-5


WITHOUT_MOEKIT = """
import sys
from typing import Any
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = load_file(folder / "logits.safetensors")
    for k in range(1, 5):
        model = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=k)
        with torch.no_grad():
            logits = model(saved["input_ids"], attention_mask=saved["attention_mask"]).logits
        expected = saved[f"logits-{k}"]
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        assert error <= 1e-5, (folder.name, k, error)
assert not any(name.startswith("moekit") for name in sys.modules)
print("all equal")
"""


@pytest.mark.slow
def test_a_process_without_moekit_loads_it_with_any_k(tmp_path):
    for kind in MODELS:
        model = convert(kind)
        to_stock(model).save_pretrained(tmp_path / kind)
        saved = inputs()
        for k in (1, 2, 3, 4):
            set_active_experts(model, k)
            with torch.no_grad():
                saved[f"logits-{k}"] = model(**inputs()).logits
        save_file(saved, tmp_path / kind / "logits.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MOEKIT, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all equal" in done.stdout


def test_configs_and_tokens_are_carried_over():
    model = convert("llama-tied", active_experts=3)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[2, 5])
    model.config.eos_token_id = [2, 5]
    stock = to_stock(model)
    config = stock.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], 0)
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (4, 3, 16)
    assert config._attn_implementation == model.config._attn_implementation
    assert stock.generation_config.to_dict() == model.generation_config.to_dict()
    assert stock.generation_config is not model.generation_config
    assert not hasattr(config, "quantization_config")
    assert not stock.training
    assert to_stock(model.train()).training


def test_only_the_down_projections_take_new_memory():
    model = convert("qwen3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = to_stock(model)
    owned = {tensor.data_ptr() for tensor in model.state_dict().values()}
    new = [name for name, tensor in stock.named_parameters() if tensor.data_ptr() not in owned]
    assert new == [f"model.layers.{n}.mlp.experts.down_proj" for n in range(3)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(smoe_layers(model)["model.layers.0.mlp"].router.weight, torch.Tensor)
    assert {parameter.device.type for parameter in stock.parameters()} == {"cpu"}


def test_a_checkpoint_of_the_moekit_form_becomes_a_stock_one(tmp_path):
    model = convert("llama-tied", active_experts=2)
    save_checkpoint(model, tmp_path)
    stock = to_stock(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert max_logit_difference(model, stock, inputs()) < 1e-5
    assert stock.config.to_dict() == to_stock(model).config.to_dict() | {
        "dtype": "float32",
        "_name_or_path": stock.config._name_or_path,
    }


def test_tied_embeddings_stay_tied():
    stock = to_stock(convert("llama-tied"))
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"scale": 3.0}, {"start": "copy", "partition": "contiguous"}])
def test_any_scale_and_copies_are_exact(options):
    model = convert("llama", active_experts=2, **options)
    assert max_logit_difference(model, to_stock(model), inputs()) < 1e-5


def test_a_learned_router_without_bias_is_exact():
    model = convert("llama", router="learned", active_experts=2)
    assert max_logit_difference(model, to_stock(model), inputs()) < 1e-5


def test_half_precision_stays_half(tmp_path):
    model = convert("mistral", active_experts=2).bfloat16()
    stock = to_stock(model)
    assert {tensor.dtype for tensor in stock.state_dict().values()} == {torch.bfloat16}
    assert max_logit_difference(model, stock, inputs()) < 0.05
    stock.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layers_that_stayed_dense_stay_dense_where_the_class_can(tmp_path, kind):
    model = convert(kind, layers=[1], active_experts=2)
    stock = to_stock(model)
    assert stock.config.mlp_only_layers == [0, 2]
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert max_logit_difference(model, loaded, inputs()) < 1e-5


def test_layers_that_stayed_dense_are_refused_elsewhere():
    with pytest.raises(
        ValueError, match=r"layers \[0, 2\] are dense, and mixtral cannot mix; keep the moekit"
    ):
        to_stock(convert("llama", layers=[1]))


def test_uniform_weights_are_nearly_expressed_when_asked_for():
    model = convert("llama", combine="uniform")
    with pytest.raises(ValueError, match="uniform_as_softmax=True"):
        to_stock(model)
    for k in (1, 3, 4):
        set_active_experts(model, k)
        stock = to_stock(model, uniform_as_softmax=True)
        assert max_logit_difference(model, stock, inputs()) < (1e-5 if k == 1 else 0.02)


def test_a_router_too_small_to_shrink_is_refused():
    model = convert("llama", combine="uniform").half()
    with pytest.raises(ValueError, match=r"rows cannot be divided by 256 in torch.float16"):
        to_stock(model, uniform_as_softmax=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_bias": True}, "mixtral has no attention_bias=True of llama"),
        ({"mlp_bias": True}, "has an FFN with biases"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_the_class_cannot_say_is_refused(overrides, message):
    model = dense("Llama", overrides)
    with pytest.raises(ValueError, match=f"{message}.*keep the moekit form"):
        to_stock(to_smoe_dropout(model, 4))


def test_mixed_sliding_windows_are_refused_where_the_class_has_one():
    model = dense("Qwen3", SLIDES_IN_SOME)
    with pytest.raises(ValueError, match="qwen3_moe cannot mix layers with and without a sliding window"):
        to_stock(to_smoe_dropout(model, 4))


def test_a_window_that_no_layer_uses_is_left_out():
    model = dense("Qwen3", SLIDES_IN_ALL | {"max_window_layers": 9})
    stock = to_stock(to_smoe_dropout(model, 4))
    assert max_logit_difference(model, stock, inputs()) < 1e-5
    assert stock.config.sliding_window is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "residual"}, "combine='residual'"),
        ({"router": "hash"}, "router of kind 'hash'"),
        ({"router": "thor"}, "router of kind 'thor'"),
    ],
)
def test_what_no_stock_class_computes_is_refused(options, message):
    model = convert("llama", **options)
    with pytest.raises(ValueError, match=f"layer 'model.layers.0.mlp' has .*{message}.*keep the moekit form"):
        to_stock(model, uniform_as_softmax=True)


def test_a_router_with_a_bias_is_refused():
    model = convert("llama")
    with torch.no_grad():
        list(smoe_layers(model).values())[1].router.bias[2] = 0.1
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp' has a router with a bias"):
        to_stock(model)


def test_different_k_in_the_layers_are_refused():
    model = convert("llama", active_experts=2)
    set_active_experts(model, [1, 2, 3])
    with pytest.raises(ValueError, match=r"different numbers of active experts, \[1, 2, 3\]"):
        to_stock(model)


def test_a_model_out_of_memory_is_refused():
    with pytest.raises(ValueError, match="not in memory"):
        to_stock(convert("llama").to("meta"))


def test_tensors_without_a_place_are_refused():
    model = convert("llama")
    model.model.layers[0].self_attn.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"self_attn.extra' is \(2,\) in the model and absent in Mixtral"):
        to_stock(model)


@pytest.mark.parametrize(
    "family",
    [
        Family("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        Family("BertConfig", "BertForMaskedLM"),
        Family("LlamaConfig", "LlamaForSequenceClassification"),
    ],
)
def test_other_families_and_heads_are_refused(family):
    with pytest.raises(UnsupportedModelError, match="no stock Mixture-of-Experts class is known for"):
        to_stock(to_smoe_dropout(family(), 4))


def test_a_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="has no SMoE-Dropout layers"):
        to_stock(dense("Llama"))


def test_engines_that_would_be_wrong_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        to_stock(convert("olmo2"))
        to_stock(convert("qwen2"))
    assert "FlexOlmoForCausalLM: vLLM ignores norm_topk_prob" in caplog.text
    assert "Qwen2MoeForCausalLM: llama.cpp ignores norm_topk_prob" in caplog.text


def test_a_width_that_the_default_cannot_run_is_named(caplog):
    model = to_smoe_dropout(dense("Llama", {"intermediate_size": 24}), 4)
    with caplog.at_level(logging.WARNING):
        stock = to_stock(model)
    assert (
        "experts of width 6 are not run by Transformers' default, which needs a multiple of 4" in caplog.text
    )
    stock.set_experts_implementation("eager")
    assert max_logit_difference(model, stock, inputs()) < 1e-5
