import json

import pytest
import torch
from moekit.moe import (
    MoekitConfig,
    UnsupportedModelError,
    dense_ffns,
    expert_layers,
    max_logit_difference,
    record_routing,
    save_checkpoint,
    set_active_experts,
    smoe_layers,
    to_smoe_dropout,
    update_expert_count,
)
from transformers import AutoModel, AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from .dense_models import DENSE_MODELS, inputs_for

KINDS = ["llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "roberta", "vit"]
PARTITIONS = ["contiguous", "random", "weights"]


def build(kind: str):
    torch.manual_seed(0)
    return DENSE_MODELS[kind]().eval()


def pair(kind: str, **options):
    """A dense model and its conversion, with inputs."""
    dense, converted = build(kind), build(kind)
    to_smoe_dropout(converted, 4, **options)
    return dense, converted, inputs_for(dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["uniform", "residual"])
def test_all_experts_active_are_the_dense_model(kind, combine):
    dense, converted, inputs = pair(kind, combine=combine, partition="random")
    assert max_logit_difference(dense, converted, inputs) < 1e-5


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_partition_is_exact_in_float64(kind, partition):
    dense, converted = build(kind).double(), build(kind).double()
    to_smoe_dropout(converted, 4, combine="uniform", partition=partition)
    inputs = inputs_for(dense)
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs).logits, dense(**inputs).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_without_logits_is_the_dense_model_and_with_them_nearly(kind):
    dense, converted, inputs = pair(kind, combine="softmax", logit_std=0.0)
    assert max_logit_difference(dense, converted, inputs) < 1e-5
    _, converted, _ = pair(kind, combine="softmax")
    assert 0 < max_logit_difference(dense, converted, inputs) < 0.5


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_copies_are_the_dense_model_at_every_k(kind, k):
    dense, converted, inputs = pair(kind, start="copy", active_experts=k)
    assert max_logit_difference(dense, converted, inputs) < 1e-5


def test_drop_upcycling_makes_copies_differ():
    dense, converted, inputs = pair("llama", start="copy", drop_fraction=0.5, active_experts=1)
    assert max_logit_difference(dense, converted, inputs) > 1e-3
    layer = next(iter(smoe_layers(converted).values()))
    assert not torch.equal(layer.experts.down_proj[0], layer.experts.down_proj[1])


def test_carving_keeps_the_number_of_parameters():
    dense, converted, _ = pair("gpt2")
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in dense.parameters())


def test_the_seed_alone_decides_the_routers():
    _, one, _ = pair("llama", seed=3)
    _, same, _ = pair("llama", seed=3)
    _, other, _ = pair("llama", seed=4)
    key = next(name for name in one.state_dict() if name.endswith("router.weight"))
    assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    weights = [layer.router.weight for layer in smoe_layers(one).values()]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("router", ["random", "learned"])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, router):
    _, converted, inputs = pair("llama", router=router, active_experts=2)
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path)
    assert {layer.active_experts for layer in smoe_layers(loaded).values()} == {2}
    assert max_logit_difference(converted, loaded, inputs) < 1e-6
    state = loaded.state_dict()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_k_may_be_given_when_loading(tmp_path, kind, k):
    _, converted, inputs = pair(kind)
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path, num_experts_per_tok=k).eval()
    set_active_experts(converted, k)
    assert max_logit_difference(converted, loaded, inputs) < 1e-6
    assert loaded.config.num_experts_per_tok == k


def test_layers_may_have_different_k(tmp_path):
    _, converted, inputs = pair("llama")
    set_active_experts(converted, [1, 3])
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path)
    assert [layer.active_experts for layer in smoe_layers(loaded).values()] == [1, 3]
    assert max_logit_difference(converted, loaded, inputs) < 1e-6


def test_some_layers_may_stay_dense(tmp_path):
    dense, converted, inputs = pair("llama", layers=[1], combine="uniform")
    assert list(smoe_layers(converted)) == [dense_ffns(dense)[1].name]
    assert max_logit_difference(dense, converted, inputs) < 1e-5
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path)
    assert max_logit_difference(converted, loaded, inputs) < 1e-6


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused_everywhere(tmp_path, k):
    _, converted, _ = pair("llama")
    with pytest.raises(ValueError, match=f"active_experts={k} is not between 1 and 4 experts"):
        set_active_experts(converted, k)
    with pytest.raises(ValueError, match=f"active_experts={k} is not between 1 and 4 experts"):
        set_active_experts(converted, [2, k])
    assert {layer.active_experts for layer in smoe_layers(converted).values()} == {4}
    converted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"active_experts={k} is not between 1 and 4 experts"):
        type(converted).from_pretrained(tmp_path, num_experts_per_tok=k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 5}, r"5 experts do not divide .* possible: 2, 3, 4"),
        ({"num_experts": 1}, "num_experts=1 is not an integer of at least 2"),
        ({"router": "top"}, "router='top' is not one of"),
        ({"num_experts": 0}, "num_experts=0 is not an integer of at least 2"),
        ({"layers": []}, "layers names none"),
        ({"partition": "magic"}, "partition='magic' is not one of"),
        ({"start": "copy", "combine": "residual"}, "combine='residual'"),
        ({"drop_fraction": 0.5}, "drop_fraction=0.5 is for start='copy'"),
        ({"start": "copy", "drop_fraction": 1.5}, "drop_fraction=1.5 is not between 0 and 1"),
        ({"active_experts": 9}, "active_experts=9 is not between 1 and 4 experts"),
        ({"logit_std": float("nan")}, "logit_std=nan"),
        ({"scale": 0.0}, "scale=0.0 is not a positive number"),
        ({"partition": [torch.arange(4).view(4, 1)]}, "1 partitions are given"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(options, message):
    model = build("llama")
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        to_smoe_dropout(model, **({"num_experts": 4} | options))
    assert list(model.state_dict()) == list(before)
    assert not smoe_layers(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"num_experts": 1}, "num_experts=1 is not an integer of at least 2"),
        ({"combine": "sum"}, "combine='sum' is not one of"),
        ({"router": "os.system"}, "router='os.system' is not one of"),
        ({"scale": float("nan")}, "scale=nan is not a positive number"),
        ({"widths": {}}, "names no layer"),
        ({"scale": 1e300}, "scale=1e.300 is not a positive number of at most"),
        ({"widths": {"model.layers.0.mlp": 0}}, "experts of width 0 cannot be"),
        ({"extra": 1}, "does not have exactly the entries"),
    ],
)
def test_a_damaged_config_is_refused(damage, message):
    _, converted, _ = pair("llama")
    entry = converted.config.quantization_config.to_dict()["smoe_dropout"]
    with pytest.raises(ValueError, match=message):
        MoekitConfig(smoe_dropout=entry | damage)


@pytest.mark.parametrize("damage", ["layer", "k"])
def test_a_config_that_does_not_fit_the_model_is_refused(tmp_path, damage):
    _, converted, _ = pair("llama")
    set_active_experts(converted, 2)
    converted.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if damage == "layer":
        widths = config["quantization_config"]["smoe_dropout"]["widths"]
        widths["model.layers.7.mlp"] = widths.pop("model.layers.1.mlp")
    else:
        config["num_experts_per_tok"] = [1, 2, 3]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no FFN 'model\.layers\.7\.mlp'|3 numbers of active experts"):
        type(converted).from_pretrained(tmp_path)


def test_a_base_model_and_a_head_model_read_each_others_checkpoints(tmp_path):
    _, converted, inputs = pair("llama", active_experts=2)
    converted.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        hidden = converted.model(**inputs).last_hidden_state
        torch.testing.assert_close(base(**inputs).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    assert len(smoe_layers(classifier)) == 2
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(**inputs).last_hidden_state, hidden)


def test_a_config_that_leaves_a_layer_out_is_refused(tmp_path):
    _, converted, _ = pair("llama")
    converted.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["smoe_dropout"]["widths"]["model.layers.1.mlp"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.1\.mlp.*it is damaged"):
        type(converted).from_pretrained(tmp_path)


def test_what_has_experts_already_is_refused():
    _, converted, _ = pair("llama", layers=[0])
    with pytest.raises(UnsupportedModelError, match="has SMoE-Dropout layers already"):
        to_smoe_dropout(converted, 4)
    config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="is a Mixture-of-Experts model already"):
        to_smoe_dropout(MixtralForCausalLM(config), 4)


def test_a_learned_router_needs_a_rule_that_teaches_it():
    with pytest.raises(ValueError, match="gets no gradient from combine='uniform'"):
        to_smoe_dropout(build("llama"), 4, "uniform", router="learned")


def test_a_dense_model_has_no_active_experts_to_set():
    with pytest.raises(UnsupportedModelError, match="has no SMoE-Dropout layers"):
        set_active_experts(build("llama"), 2)


@pytest.mark.parametrize("router", ["random", "learned", "hash", "thor"])
def test_routing_is_recorded_as_in_any_moe_model(router):
    combine = "softmax" if router in ("random", "learned") else "uniform"
    _, converted, inputs = pair("llama", active_experts=2, router=router, combine=combine)
    layers = expert_layers(converted)
    assert [(layer.num_experts, layer.top_k) for layer in layers] == [(4, 2)] * 2
    before = converted(**inputs).logits
    with record_routing(converted) as statistics:
        after = converted(**inputs).logits
    torch.testing.assert_close(before, after)
    assert int(statistics.layers[layers[0].name].counts.sum()) == 2 * inputs["input_ids"].numel()


def test_the_rule_of_the_router_is_found_by_watching_it():
    _, converted, _ = pair("llama", active_experts=2)
    constraints = expert_layers(converted)[0].router_constraints
    assert (constraints.scoring, constraints.renormalises, constraints.scale) == ("softmax", True, 4.0)
    assert not constraints.has_correction_bias


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_afterwards_it_is_saved_exactly(tmp_path, kind):
    """Four logical experts on two physical ones, behind the frozen router of four."""
    _, converted, inputs = pair(kind, active_experts=2)
    for layer in expert_layers(converted):
        experts = layer.experts()
        layer.replace_experts([experts[0], experts[2]], [0, 0, 1, 1])
    assert save_checkpoint(converted, tmp_path) == "moekit"
    loaded = type(converted).from_pretrained(tmp_path).eval()
    assert [layer.num_physical_experts for layer in expert_layers(loaded)] == [2, 2]
    assert max_logit_difference(converted, loaded, inputs) < 1e-6


def test_experts_can_be_removed_with_their_rows_of_the_router(tmp_path):
    _, converted, inputs = pair("llama", active_experts=2)
    for layer in expert_layers(converted):
        layer.remove_experts([0, 2, 3])
    update_expert_count(converted, 4, 3)
    save_checkpoint(converted, tmp_path)
    loaded = type(converted).from_pretrained(tmp_path, num_experts_per_tok=3).eval()
    set_active_experts(converted, 3)
    assert max_logit_difference(converted, loaded, inputs) < 1e-6
