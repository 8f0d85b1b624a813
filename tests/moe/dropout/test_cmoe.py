import copy

import pytest
import torch
from moekit.moe import (
    AnalyticRouter,
    coactivation_partitions,
    dense_ffns,
    ffn_activations,
    max_logit_difference,
    set_active_experts,
    smoe_layers,
    to_cmoe,
    to_dense,
    to_smoe_dropout,
)
from torch import nn

from .dense_models import DENSE_MODELS, inputs_for

EXPERTS, SHARED = 8, 2


def build(kind: str):
    torch.manual_seed(0)
    return DENSE_MODELS[kind]().eval()


def carved(kind: str):
    dense, model = build(kind), build(kind)
    to_cmoe(model, [inputs_for(dense)], EXPERTS, SHARED)
    return dense, model, inputs_for(dense)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_all_experts_active_are_the_dense_model(kind):
    dense, model, inputs = carved(kind)
    assert max_logit_difference(dense, model, inputs) < 1e-5


def test_shared_experts_are_chosen_for_every_token_at_any_k():
    _, model, inputs = carved("llama")
    for k in (SHARED, SHARED + 3):
        set_active_experts(model, k)
        chosen = []
        router = next(iter(smoe_layers(model).values())).router
        handle = router.register_forward_hook(
            lambda module, args, output, into=chosen: into.append(output[2])
        )
        model(**inputs)
        handle.remove()
        assert all({0, 1} <= set(row) and len(set(row)) == k for row in chosen[0].tolist())


def test_shared_experts_cannot_be_switched_off():
    _, model, _ = carved("llama")
    set_active_experts(model, 4)
    with pytest.raises(ValueError, match="active_experts=1 is less than the 2 shared experts"):
        set_active_experts(model, [3, 1])
    assert {layer.active_experts for layer in smoe_layers(model).values()} == {4}


def test_the_score_of_an_expert_is_its_representative_neurons_activation():
    dense, model, inputs = carved("llama")
    rows = ffn_activations(dense, [inputs])
    name, layer = next(iter(smoe_layers(model).items()))
    ffn = dense_ffns(dense)[0]
    hidden = torch.randn(7, ffn.hidden_size)
    router = layer.router
    assert isinstance(router, AnalyticRouter)
    weights = ffn.weights
    assert weights.gate is not None
    every_neuron = (nn.functional.silu(hidden @ weights.gate.T) * (hidden @ weights.up.T)).abs()
    scores = router.scores(hidden)
    for expert in range(SHARED, EXPERTS):
        matches = (every_neuron - scores[:, expert, None]).abs().amax(0)
        assert float(matches.min()) < 1e-6, f"no neuron speaks for expert {expert} of {name}"
    assert rows[name].shape == (inputs["input_ids"].numel(), ffn.width)


def test_saved_and_loaded_it_is_the_same_model(tmp_path):
    _, model, inputs = carved("llama")
    set_active_experts(model, 4)
    for layer in smoe_layers(model).values():
        nn.init.uniform_(layer.router.gain)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert max_logit_difference(model, loaded, inputs) < 1e-6


def test_the_gain_is_all_that_trains_of_the_router():
    _, model, inputs = carved("llama")
    set_active_experts(model, 4)
    model(**inputs).logits.square().mean().backward()
    router = next(iter(smoe_layers(model).values())).router
    assert [name for name, _ in router.named_parameters(recurse=False)] == ["gain"]
    assert router.gain.grad[SHARED:].abs().sum() > 0
    assert not router.gain.grad[:SHARED].any()


def test_padding_says_nothing_about_neurons():
    model = build("llama")
    inputs = inputs_for(model)
    ids = inputs["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids)], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    }
    plain, without_padding = ffn_activations(model, [{"input_ids": ids}]), ffn_activations(model, [padded])
    for name, rows in plain.items():
        torch.testing.assert_close(without_padding[name], rows)
    few = ffn_activations(model, [{"input_ids": ids}], max_tokens=3)
    assert all(len(rows) == 3 for rows in few.values())
    with pytest.raises(ValueError, match="no token"):
        ffn_activations(model, [])


def test_coactivation_partitions_fit_the_conversion():
    dense, model = build("gpt2"), build("gpt2")
    inputs = inputs_for(dense)
    partition = coactivation_partitions(dense, [inputs], 4)
    to_smoe_dropout(model, 4, "uniform", partition=partition)
    assert max_logit_difference(dense, model, inputs) < 1e-5


def test_other_rules_are_refused():
    with pytest.raises(ValueError, match="router='analytic' needs combine='residual'"):
        to_smoe_dropout(build("llama"), 4, "uniform", router="analytic")


def test_it_becomes_dense_again_and_learned_gains_are_folded_at_their_mean():
    dense, model, inputs = carved("llama")
    exact = to_dense(copy.deepcopy(model))
    assert max_logit_difference(dense, exact, inputs) < 1e-5
    for layer in smoe_layers(model).values():
        nn.init.constant_(layer.router.gain, 0.5)
    near = to_dense(copy.deepcopy(model), [inputs])
    assert max_logit_difference(model, near, inputs) < max_logit_difference(model, dense, inputs)


def test_some_layers_may_stay_dense():
    dense, model = build("llama"), build("llama")
    inputs = inputs_for(dense)
    to_cmoe(model, [inputs], EXPERTS, SHARED, layers=[1])
    assert list(smoe_layers(model)) == [dense_ffns(dense)[1].name]
    assert max_logit_difference(dense, model, inputs) < 1e-5
