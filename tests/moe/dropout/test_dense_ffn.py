"""Dense feed-forward networks: found in every kind of model, read as views, replaced without a trace."""

import pytest
import torch
import transformers
from moekit.moe.discovery import UnsupportedModelError
from moekit.moe.dropout.dense_ffn import DenseFFN, dense_ffns
from moekit.moe.dropout.experts import SlicedExperts
from moekit.moe.dropout.layer import SMoEDropout
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families import FAMILIES
from .dense_models import BART, DENSE_MODELS, T5, TEXT, inputs_for

every_model = pytest.mark.parametrize("family", DENSE_MODELS)


class Twin(nn.Module):
    """The same function as an FFN, from copies of its weights."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        self.parts = {name: tensor.clone() for name, tensor in ffn.weights.named_tensors()}
        self.activation, self.dropout = ffn.activation, ffn.dropout

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.parts
        neurons = hidden @ parts["up"].T + parts.get("up_bias", 0)
        if "gate" in parts:
            neurons = self.activation(hidden @ parts["gate"].T + parts.get("gate_bias", 0)) * neurons
        else:
            neurons = self.activation(neurons)
        out = neurons @ parts["down"].T + parts.get("down_bias", 0)
        return out if self.dropout is None else self.dropout(out)


def replace_all(model: PreTrainedModel) -> list[DenseFFN]:
    ffns = dense_ffns(model)
    for ffn in ffns:
        ffn.replace(model, Twin(ffn))
    return ffns


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**inputs_for(model)).logits


@every_model
@torch.no_grad()
def test_weights_are_views_of_the_models_own(family: str) -> None:
    model = DENSE_MODELS[family]()
    names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    ffns = dense_ffns(model)
    before = logits(model)
    for ffn in ffns:
        place = ffn.name.rpartition(".")[0] if ffn.emptied else ffn.name
        for _, tensor in ffn.weights.named_tensors():
            assert not tensor.requires_grad
            assert names[tensor.untyped_storage().data_ptr()].startswith(f"{place}.")
            tensor.zero_()
    assert not torch.allclose(logits(model), before)


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_a_twin_in_its_place_changes_nothing(family: str, training: bool) -> None:
    model = DENSE_MODELS[family]().train(training)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = logits(model)
    ffns = replace_all(model)
    assert len(ffns) == model.config.num_hidden_layers * (2 if model.config.is_encoder_decoder else 1)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-6)
    for ffn in ffns:
        assert isinstance(model.get_submodule(ffn.name), Twin)
        assert all(type(model.get_submodule(name)) is nn.Identity for name in ffn.emptied)


@every_model
def test_no_weight_of_the_ffn_stays_behind(family: str) -> None:
    model = DENSE_MODELS[family]()
    total = sum(p.numel() for p in model.parameters())
    ffns = dense_ffns(model)
    size = sum(tensor.numel() for ffn in ffns for _, tensor in ffn.weights.named_tensors())
    for ffn in ffns:
        ffn.replace(model, nn.Identity())
    activations = {p for ffn in ffns for p in ffn.activation.parameters()}
    assert sum(p.numel() for p in model.parameters()) == total - size - sum(p.numel() for p in activations)


@every_model
def test_the_meta_device_is_enough(family: str) -> None:
    model = DENSE_MODELS[family]()
    with torch.device("meta"):
        shapes = type(model)(model.config)
        found = dense_ffns(shapes)
    for one, two in zip(found, dense_ffns(model), strict=True):
        assert (one.name, one.emptied) == (two.name, two.emptied)
        assert (one.hidden_size, one.width) == (two.hidden_size, two.width)
        assert repr(one.activation) == repr(two.activation)
        assert repr(one.dropout) == repr(two.dropout)
        for (name, a), (other, b) in zip(
            one.weights.named_tensors(), two.weights.named_tensors(), strict=True
        ):
            assert (name, a.shape, a.stride()) == (other, b.shape, b.stride())
            assert a.storage_offset() == b.storage_offset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_proof_holds_in_any_precision(dtype: torch.dtype) -> None:
    for family in ("llama", "gpt2", "opt", "bert", "vit"):
        assert len(dense_ffns(DENSE_MODELS[family]().to(dtype))) == 2


def test_looking_leaves_no_trace() -> None:
    for family in ("gpt2", "opt", "bert"):
        model = DENSE_MODELS[family]().train()
        model.get_submodule(dense_ffns(model)[0].name).eval()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        dense_ffns(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "name", "emptied"),
    [
        ("llama", "model.layers.1.mlp", ()),
        ("gpt2", "transformer.h.1.mlp", ()),
        ("opt", "model.decoder.layers.1.fc1", ("activation_fn", "fc2")),
        ("bert", "bert.encoder.layer.1.intermediate", ("output.dense",)),
        ("distilbert", "distilbert.transformer.layer.1.ffn", ()),
        ("vit", "vit.layers.1.mlp", ()),
        ("openai_gpt", "transformer.h.1.mlp", ()),
    ],
)
def test_names(family: str, name: str, emptied: tuple[str, ...]) -> None:
    layer = name.rpartition(".")[0]
    ffn = dense_ffns(DENSE_MODELS[family]())[1]
    assert ffn.name == name
    assert ffn.emptied == tuple(f"{layer}.{part}" for part in emptied)


def test_the_gate_is_what_the_activation_reads() -> None:
    for family in ("llama", "llama_square", "lfm2"):
        model = DENSE_MODELS[family]()
        ffn = dense_ffns(model)[0]
        module = model.get_submodule(ffn.name)
        gate = module.w1 if family == "lfm2" else module.gate_proj
        assert ffn.weights.gate.data_ptr() == gate.weight.data_ptr()
    for family in ("phi3", "glm"):
        model = DENSE_MODELS[family]()
        ffn = dense_ffns(model)[0]
        fused = model.get_submodule(ffn.name).gate_up_proj.weight
        assert torch.equal(torch.cat([ffn.weights.gate, ffn.weights.up]), fused)


@pytest.mark.parametrize(
    ("family", "setting", "kept"),
    [
        ("gpt2", "resid_pdrop", True),
        ("distilbert", "dropout", True),
        ("starcoder2", "residual_dropout", True),
        ("opt", "dropout", False),
        ("bert", "hidden_dropout_prob", False),
        ("vit", "hidden_dropout_prob", False),
    ],
)
def test_whose_dropout_it_is(family: str, setting: str, kept: bool) -> None:
    config = DENSE_MODELS[family]().config
    setattr(config, setting, 0.3)
    model = type(DENSE_MODELS[family]())(config)
    for ffn in dense_ffns(model):
        assert (ffn.dropout is not None) == kept
        assert ffn.dropout is None or ffn.dropout.p == 0.3


def test_every_layer_has_its_own_width() -> None:
    model = DENSE_MODELS["bart"]()
    assert [ffn.width for ffn in dense_ffns(model)] == [24, 24, 40, 40]
    assert {ffn.hidden_size for ffn in dense_ffns(model)} == {16}


def test_some_layers_only() -> None:
    model = DENSE_MODELS["llama"]()
    assert [ffn.name for ffn in dense_ffns(model, [1])] == ["model.layers.1.mlp"]
    assert [ffn.name for ffn in dense_ffns(model, [1, 0])] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert dense_ffns(model, []) == []
    for layers in ([2], [-1], [0, 0]):
        with pytest.raises(ValueError, match="no layers of LlamaForCausalLM with a dense"):
            dense_ffns(model, layers)


def test_dense_layers_of_a_mixture_are_found_by_their_number() -> None:
    model = FAMILIES["deepseek_v3"]()
    assert [ffn.name for ffn in dense_ffns(model)] == ["model.layers.0.mlp"]
    with pytest.raises(ValueError, match=r"layers=\[1\].*which are \[0\]"):
        dense_ffns(model, [1])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma4", "dbrx", "jetmoe", "qwen2_moe"])
def test_mixtures_are_sent_to_compression(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="Mixture-of-Experts model already: use moekit compress"):
        dense_ffns(FAMILIES[family]())


def test_what_is_converted_is_not_found_again() -> None:
    model = DENSE_MODELS["llama"]()
    first, second = dense_ffns(model)
    experts = SlicedExperts(4, 6, 16, first.activation, has_gate=True, has_bias=False, like=first.weights.up)
    first.replace(model, SMoEDropout(nn.Identity(), experts))
    assert [ffn.name for ffn in dense_ffns(model)] == [second.name]
    assert [ffn.name for ffn in dense_ffns(model, [1])] == [second.name]
    with pytest.raises(ValueError, match=r"layers=\[0\].*which are \[1\]"):
        dense_ffns(model, [0])


@pytest.mark.parametrize(
    ("model", "config", "values", "message"),
    [
        (
            "BloomForCausalLM",
            "BloomConfig",
            {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2},
            r"BloomForCausalLM is not supported: 'transformer.h.0.mlp' \(BloomMLP\).*'residual'",
        ),
        (
            "AlbertForMaskedLM",
            "AlbertConfig",
            TEXT | {"embedding_size": 16},
            "AlbertForMaskedLM is not supported: its layers share one feed-forward network",
        ),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            T5 | {"dropout_rate": 0.1},
            "T5DenseActDense.*dropout to its neurons; set that dropout to 0",
        ),
        (
            "BartForConditionalGeneration",
            "BartConfig",
            BART | {"activation_dropout": 0.1},
            "BartEncoderLayer.*dropout to its neurons; set that dropout to 0",
        ),
        (
            "MambaForCausalLM",
            "MambaConfig",
            {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1},
            r"found no feed-forward network in MambaForCausalLM.*MambaBlock, has norm .*, mixer",
        ),
        (
            "ResNetForImageClassification",
            "ResNetConfig",
            {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
            "found no feed-forward network in ResNetForImageClassification",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_no_such_network_is_refused(
    model: str, config: str, values: dict[str, object], message: str, device: str
) -> None:
    with torch.device(device):
        built = getattr(transformers, model)(getattr(transformers, config)(**values))
    with pytest.raises(UnsupportedModelError, match=message):
        dense_ffns(built)


def test_a_function_of_another_form_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.c_fc, self.c_proj, self.act = mlp.c_fc, mlp.c_proj, mlp.act

        def forward(self, hidden: Tensor) -> Tensor:
            return self.c_proj(2 * self.act(self.c_fc(hidden)))

    model = DENSE_MODELS["gpt2"]()
    model.transformer.h[1].mlp = Scaled(model.transformer.h[1].mlp)
    with pytest.raises(UnsupportedModelError, match=r"'transformer.h.1.mlp' \(Scaled\).*something else"):
        dense_ffns(model)
    assert len(dense_ffns(model, [0])) == 1


def test_shared_networks_are_refused() -> None:
    model = DENSE_MODELS["llama"]()
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight = getattr(model.model.layers[0].mlp, name).weight
    with pytest.raises(UnsupportedModelError, match="its layers share one feed-forward network"):
        dense_ffns(model)
