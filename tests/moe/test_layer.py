"""`ExpertLayer`: reading, replacing, observing, and what it refuses before anything is changed."""

# T tokens, K active experts

import dataclasses

import pytest
import torch
from moekit.moe import expert_layers
from moekit.moe.storage import ExpertStorage, write_experts
from torch import nn

from .families import tiny_inputs
from .samples import close, fresh, logits, merged

SOME = ["qwen3_moe", "gpt_oss", "switch_transformers", "dbrx", "jetmoe", "llama4", "longcat_flash"]


@pytest.mark.parametrize("family", SOME)
def test_sizes_before_and_after_merging(family: str) -> None:
    for model, num_physical in ((fresh(family), 8), (merged(family, 3), 3)):
        for layer in expert_layers(model):
            assert (layer.num_experts, layer.num_physical_experts) == (8, num_physical)
            assert len(layer.experts()) == num_physical
            assert layer.hidden_size == 32
            assert isinstance(layer.storage, ExpertStorage)
            assert f"on {num_physical}" in repr(layer) or num_physical == 8


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    ("num_kept", "expert_map", "message"),
    [
        (4, [0, 1, 2, 3], "expert_map has 4 entries for the 8 experts of layer"),
        (4, [0, 1, 2, 2] * 2, r"points to the experts \[0, 1, 2\]; it must use each of 0\.\.3"),
        (2, [0, 1, 2, 1] * 2, r"points to the experts \[0, 1, 2\]; it must use each of 0\.\.1"),
        (2, [0, -1] * 4, r"points to the experts \[-1, 0\]"),
    ],
)
def test_maps_that_do_not_fit_change_nothing(family, num_kept, expert_map, message) -> None:
    model = fresh(family)
    expected = logits(model, tiny_inputs(model))
    for layer in expert_layers(model):
        with pytest.raises(ValueError, match=message):
            layer.replace_experts(layer.experts()[:num_kept], expert_map)
    assert torch.equal(logits(model, tiny_inputs(model)), expected)


@pytest.mark.parametrize("family", SOME)
def test_experts_of_other_shapes_change_nothing(family: str) -> None:
    model = fresh(family)
    expected = logits(model, tiny_inputs(model))
    for layer in expert_layers(model):
        experts = layer.experts()[:4]
        experts[3] = dataclasses.replace(experts[3], up=experts[3].up[1:])
        with pytest.raises(ValueError, match="does not fit a layer of"):
            layer.replace_experts(experts, [0, 1, 2, 3] * 2)
    assert torch.equal(logits(model, tiny_inputs(model)), expected)


@pytest.mark.parametrize("family", SOME)
def test_replacing_keeps_what_is_trained_and_in_which_type(family: str) -> None:
    model = fresh(family).bfloat16()
    for layer in expert_layers(model):
        for parameter in layer.experts_module.parameters():
            parameter.requires_grad_(False)
        layer.replace_experts(layer.experts()[:3], [0, 1, 2, 0, 1, 2, 0, 1])
        for parameter in layer.storage.module.parameters():
            frozen = not parameter.requires_grad
            assert frozen
            assert parameter.dtype == torch.bfloat16
            assert isinstance(parameter, nn.Parameter)


def test_views_of_the_present_experts_may_come_in_any_order() -> None:
    layer = expert_layers(fresh("qwen3_moe"))[0]
    before = [expert.down.clone() for expert in layer.experts()]
    write_experts(layer.storage, layer.experts()[::-1])
    assert all(torch.equal(e.down, b) for e, b in zip(layer.experts(), before[::-1], strict=True))


def test_the_rest_of_the_model_is_not_touched() -> None:
    model, other = fresh("qwen3_moe"), merged("qwen3_moe")
    experts = tuple(f"{layer.name}.experts" for layer in expert_layers(model))
    before, after = model.state_dict(), other.state_dict()
    assert {n for n in before if not n.startswith(experts)} == {n for n in after if not n.startswith(experts)}
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith(experts))


@pytest.mark.parametrize("family", [*SOME, "deepseek_v3", "gemma4"])
def test_route_is_by_logical_expert_in_a_merged_layer(family: str) -> None:
    layer, other = expert_layers(merged(family, 2))[0], expert_layers(fresh(family))[0]
    hidden_TD = torch.randn(12, layer.input_size)
    with torch.no_grad():
        actual, expected = layer.route(hidden_TD), other.route(hidden_TD)
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    assert torch.equal(actual.routing_weights, expected.routing_weights)
    assert actual.router_logits is not None
    assert expected.router_logits is not None
    assert torch.equal(actual.router_logits, expected.router_logits)


@pytest.mark.parametrize("family", SOME)
def test_observing_sees_single_experts_and_leaves_nothing(family: str) -> None:
    model = fresh(family)
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    layer = expert_layers(model)[-1]
    modules = (layer.block, layer.router, layer.experts_module)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    seen = []
    with layer.observe_outputs(lambda ids, weights, outputs: seen.append((ids, weights, outputs))):
        close(logits(model, inputs), expected)
    ids_TK, weights_TK, outputs_TKD = seen[0]
    assert outputs_TKD.shape == (*ids_TK.shape, 32)
    assert weights_TK.shape == ids_TK.shape
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == hooks
    assert "forward" not in vars(layer.experts_module)
    assert torch.equal(logits(model, inputs), expected)


def test_observing_gives_back_a_forward_that_somebody_else_set() -> None:
    """As accelerate does on modules that it moves between devices."""
    model = fresh("qwen3_moe")
    layer = expert_layers(model)[0]
    calls = []
    inner = layer.experts_module.forward

    def theirs(*args):
        calls.append(len(args))
        return inner(*args)

    layer.experts_module.forward = theirs
    with layer.observe_outputs(lambda *_: None):
        logits(model, tiny_inputs(model))
    assert layer.experts_module.forward is theirs
    assert calls == [3]


def test_an_exception_inside_leaves_nothing() -> None:
    model = fresh("qwen3_moe")
    layer = expert_layers(model)[0]
    with pytest.raises(KeyError), layer.observe_outputs(lambda *_: None), layer.observe_logits(print):
        raise KeyError
    assert "forward" not in vars(layer.experts_module)
    assert not layer.experts_module._forward_pre_hooks
    assert not layer.router._forward_hooks


def test_llama4_with_two_choices_is_merged_by_nobody() -> None:
    model = fresh("llama4")
    layer = expert_layers(model)[0]
    layer.router.top_k = 2
    with pytest.raises(ValueError, match=r"scales the input of an expert \(Llama-4\) and has top_k=2"):
        layer.replace_experts(layer.experts()[:4], [0, 1, 2, 3] * 2)


def test_jetmoe_cannot_lose_router_rows() -> None:
    layer = expert_layers(fresh("jetmoe"))[0]
    with pytest.raises(ValueError, match="num_local_experts counts its attention experts too"):
        layer.remove_experts([0, 1, 2])


def test_rows_of_weightless_experts_survive_merging_and_removal() -> None:
    model = fresh("longcat_flash")
    layer = expert_layers(model)[0]
    with torch.no_grad():
        layer.experts_module.gate_up_proj[8:].fill_(7.0)
    layer.replace_experts(layer.experts()[:5], [e % 5 for e in range(8)])
    assert layer.experts_module.gate_up_proj.shape[0] == 5 + 2
    assert bool((layer.experts_module.gate_up_proj[5:] == 7.0).all())
    layer.remove_experts([0, 1, 2, 3])
    assert bool((layer.experts_module.gate_up_proj[4:] == 7.0).all())
