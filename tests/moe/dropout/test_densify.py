import copy

import pytest
import torch
from moekit.moe import (
    UnsupportedModelError,
    max_logit_difference,
    save_checkpoint,
    set_active_experts,
    smoe_layers,
    to_dense,
    to_smoe_dropout,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..tiny_models import Family, tiny_inputs

FULL = {"num_hidden_layers": 2}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
OPT = FULL | {"ffn_dim": 24, "word_embed_proj_dim": 32, "dropout": 0.0}
MODELS = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", FULL | {"attention_bias": True, "mlp_bias": True}),
    "gemma2": Family("Gemma2Config", "Gemma2ForCausalLM", FULL),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", FULL | {"tie_word_embeddings": True}),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", GPT2),
    "opt": Family("OPTConfig", "OPTForCausalLM", OPT),
    "bert": Family("BertConfig", "BertForMaskedLM", FULL),
    "apertus": Family("ApertusConfig", "ApertusForCausalLM", FULL),
}
"""Gated, fused, transposed, spread over the layer, in two modules, and with an activation that learns."""


def pair(kind: str, **options) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, torch.Tensor]]:
    """A dense model and its conversion into four experts, with inputs."""
    dense = MODELS[kind]()
    converted = to_smoe_dropout(copy.deepcopy(dense), 4, **options)
    return dense, converted, tiny_inputs(dense)


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 64, (4, 9), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("combine", ["uniform", "residual"])
def test_the_dense_model_comes_back_to_the_last_bit(kind, combine):
    dense, converted, inputs = pair(kind, combine=combine, active_experts=2)
    again = to_dense(converted)
    assert again is converted
    assert not smoe_layers(again)
    assert again.config.to_dict() == dense.config.to_dict()
    assert str(again) == str(dense)
    mine, theirs = again.state_dict(), dense.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert max_logit_difference(dense, again, inputs) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_order_of_the_neurons_is_the_same_function(kind):
    dense, converted, inputs = pair(kind, combine="uniform", partition="random", scale=3.0)
    converted.double()
    expected = copy.deepcopy(converted)
    assert max_logit_difference(expected, to_dense(converted), inputs) < 1e-12
    assert converted.dtype is torch.float64
    assert type(converted) is type(dense)


@pytest.mark.parametrize("router", ["hash", "thor"])
def test_equal_weights_are_exact_for_every_router(router):
    dense, converted, inputs = pair("llama", combine="uniform", router=router, active_experts=1)
    assert max_logit_difference(dense, to_dense(converted), inputs) == 0


def test_layers_that_stayed_dense_are_left_alone():
    dense, converted, inputs = pair("llama", combine="uniform", layers=[1])
    untouched = converted.model.layers[0].mlp
    assert max_logit_difference(dense, to_dense(converted), inputs) == 0
    assert converted.model.layers[0].mlp is untouched


def test_measured_softmax_weights_are_nearer_than_equal_ones():
    _, converted, _ = pair("llama", logit_std=0.5)
    with torch.no_grad():
        for layer in smoe_layers(converted).values():
            layer.router.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    guessed, measured = to_dense(copy.deepcopy(converted)), to_dense(copy.deepcopy(converted), batches())
    far, near = (max_logit_difference(converted, dense, batches(4)[3]) for dense in (guessed, measured))
    assert near < 0.7 * far


def test_softmax_without_logits_is_exact():
    dense, converted, inputs = pair("llama", logit_std=0.0)
    assert max_logit_difference(dense, to_dense(converted), inputs) < 1e-6


def test_a_constant_softmax_is_exact_once_measured():
    _, converted, inputs = pair("gpt2", logit_std=0.0)
    with torch.no_grad():
        for layer in smoe_layers(converted).values():
            layer.router.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    before = copy.deepcopy(converted)
    assert max_logit_difference(before, to_dense(converted, [inputs]), inputs) < 1e-6


def test_learned_gains_are_folded_at_their_mean_probability():
    _, converted, inputs = pair("llama", combine="residual", logit_std=0.0)
    with torch.no_grad():
        for layer in smoe_layers(converted).values():
            layer.router.gain.copy_(torch.tensor([2.0, 0.0, -1.0, 0.5]))
    before = copy.deepcopy(converted)
    assert max_logit_difference(before, to_dense(converted), inputs) < 1e-6


def test_padding_is_not_measured():
    _, converted, inputs = pair("llama", logit_std=2.0)
    poisoned = dict(inputs, input_ids=torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 9))
    mine, theirs = (to_dense(copy.deepcopy(converted), [batch]) for batch in (inputs, poisoned))
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-6, atol=0.0)


def test_it_trains_as_the_model_did():
    _, converted, _ = pair("llama", logit_std=1.0)
    converted.train()
    set_active_experts(converted, 3)
    to_dense(converted, batches(1))
    assert all(module.training for module in converted.modules())
    assert all(parameter.requires_grad for parameter in converted.parameters())


def test_a_saved_and_loaded_model_becomes_a_plain_checkpoint(tmp_path):
    dense, converted, inputs = pair("llama", combine="uniform", active_experts=3)
    save_checkpoint(converted, tmp_path / "sparse")
    loaded = to_dense(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", num_experts_per_tok=2))
    loaded.save_pretrained(tmp_path / "dense")
    config = (tmp_path / "dense" / "config.json").read_text(encoding="utf-8")
    assert "expert" not in config
    assert "quantization" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert max_logit_difference(dense, again, inputs) == 0


def test_there_and_back_and_there_again():
    dense, converted, inputs = pair("gpt2", combine="uniform")
    once_more = to_smoe_dropout(to_dense(converted), 8, "uniform")
    assert max_logit_difference(dense, once_more, inputs) < 1e-5


def test_copies_have_no_dense_form_of_that_size():
    _, converted, _ = pair("llama", start="copy")
    before = list(converted.state_dict())
    with pytest.raises(ValueError, match=r"4 experts of width 24, which are not slices .* width 24"):
        to_dense(converted)
    assert list(converted.state_dict()) == before


def test_batches_without_tokens_are_refused_before_anything_changes():
    _, converted, _ = pair("llama", active_experts=2)
    with pytest.raises(ValueError, match="no token of the batches"):
        to_dense(converted, [])
    assert {layer.active_experts for layer in smoe_layers(converted).values()} == {2}


def test_a_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="has no SMoE-Dropout layers"):
        to_dense(MODELS["llama"]())
