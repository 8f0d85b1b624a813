"""Scores of experts and pruning by them."""

import copy
import dataclasses
import math

import pytest
import torch
from moekit.compress import METHODS, SCORES, apply_plan
from moekit.moe import expert_layers, record_routing
from moekit.moe.statistics import LayerStatistics

from ..moe.samples import close, fresh_case, logits
from .plan_samples import layers_of, statistics

WITH_DATA = ["frequency", "routing-weight", "ean", "man", "reap"]


def known(counts, weights, norms, gated) -> LayerStatistics:
    made = LayerStatistics.zeros(len(counts), 4, 2)
    return dataclasses.replace(
        made,
        num_tokens=10,
        counts=torch.tensor(counts),
        routing_weight_sums=torch.tensor(weights, dtype=torch.float64),
        output_norm_sums=torch.tensor(norms, dtype=torch.float64),
        gated_output_norm_sums=torch.tensor(gated, dtype=torch.float64),
    )


def test_scores_by_hand():
    layer = layers_of("qwen3_moe")[0]
    table = known([4, 2, 0], [2.0, 1.5, 0.0], [8.0, 6.0, 0.0], [3.0, 4.0, 0.0])
    found = {name: SCORES[name](layer, table).tolist() for name in WITH_DATA}
    assert found == {
        "frequency": [4, 2, 0],
        "routing-weight": [2, 1.5, 0],
        "ean": [8, 6, 0],
        "man": [2, 3, 0],
        "reap": [0.75, 2, 0],
    }


def test_reap_is_a_mean_over_the_experts_own_tokens():
    """Of what the layer really computes, token by token."""
    model, inputs, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[0]
    seen = []
    with layer.observe_outputs(lambda ids, weights, outputs: seen.append((ids, weights, outputs))):
        logits(model, inputs)
    ids_TK, weights_TK, outputs_TKD = (torch.cat(part) for part in zip(*seen, strict=True))
    reals_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if (mask := inputs.get("attention_mask")) is not None:
        reals_TK &= mask.flatten().bool()[:, None]
    contributions_TK = weights_TK * outputs_TKD.norm(dim=-1)
    scores_E = SCORES["reap"](layer, statistics("qwen3_moe").layers[layer.name])
    for expert in range(layer.num_experts):
        own = contributions_TK[(ids_TK == expert) & reals_TK]
        assert scores_E[expert].item() == pytest.approx(own.mean().item() if len(own) else 0.0, rel=1e-5)


def test_aimer_prunes_flat_weights_first():
    model, _, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[0]
    with torch.no_grad():
        for name, tensor in layer.experts()[3].named_tensors():
            tensor.fill_(0.5 if name == "down" else -0.5)
        for _, tensor in layer.experts()[5].named_tensors():
            tensor.zero_()
            tensor[0, 0] = 1.0
    scores_E = SCORES["aimer"](layer, LayerStatistics.zeros(8, layer.hidden_size, 2))
    assert scores_E.argmin() == 3
    assert scores_E[3].item() == pytest.approx(-1)
    assert scores_E.argmax() == 5
    gaussian = [scores_E[e].item() for e in range(8) if e not in (3, 5)]
    assert all(-math.sqrt(2 / math.pi) * 1.1 < score < -math.sqrt(2 / math.pi) * 0.9 for score in gaussian)


def test_aimer_drops_an_expert_of_zeros():
    model, _, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[0]
    with torch.no_grad():
        for _, tensor in layer.experts()[2].named_tensors():
            tensor.zero_()
    scores_E = SCORES["aimer"](layer, None)
    assert scores_E.argmin() == 2
    assert scores_E[2] == -1


@pytest.mark.parametrize("name", ["aimer", "random"])
def test_scores_without_data_plan_without_statistics(name):
    layers = layers_of("qwen3_moe")
    blind = METHODS[name](layers, None, experts=4, seed=3)
    seeing = METHODS[name](layers, statistics("qwen3_moe"), experts=4, seed=3)
    assert blind.layers == seeing.layers
    given = METHODS[name](layers, None, layer_experts=(8, 3, 5))
    assert [layer.num_kept for layer in given.layers] == [8, 3, 5]
    with pytest.raises(ValueError, match="grouping='adaptive' reads how often experts are used"):
        METHODS[name](layers, None, experts=4, grouping="adaptive")
    with pytest.raises(ValueError, match="score='reap' reads the routing of calibration data"):
        METHODS["reap"](layers, None, experts=4)


def test_random_scores_follow_seed_and_layer():
    first, second = layers_of("qwen3_moe")[:2]
    table = statistics("qwen3_moe").layers[first.name]
    score = SCORES["random"]
    assert torch.equal(score(first, table, seed=1), score(first, table, seed=1))
    assert not torch.equal(score(first, table, seed=1), score(first, table, seed=2))
    assert not torch.equal(score(first, table, seed=1), score(second, table, seed=1))


@pytest.mark.parametrize("name", list(SCORES))
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_the_best_experts_stay(name, family):
    layers, table = layers_of(family), statistics(family)
    plan = METHODS[name](layers, table, experts=4)
    assert (plan.method, plan.router) == (name, "slice")
    for layer, planned in zip(layers, plan.layers, strict=True):
        scores_E = SCORES[name](layer, table.layers[layer.name], seed=0)
        best = scores_E.argsort(descending=True, stable=True)[:4].tolist()
        assert planned.cores == sorted(best)
    whole = METHODS[name](layers, table, experts=layers[0].num_experts)
    assert all(layer.is_identity for layer in whole.layers)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_cut_rows_are_masked_logits(family):
    """A renormalising softmax router without a row chooses as if the row's logit were -inf."""
    model, inputs, _ = fresh_case(family)
    plan = METHODS["reap"](expert_layers(model), statistics(family), experts=4, form="stock")
    masked = copy.deepcopy(model)
    apply_plan(model, plan)
    for layer, planned in zip(expert_layers(masked), plan.layers, strict=True):
        gate = layer.router

        def forward(hidden, _gate=gate, _removed=planned.removed):
            logits_TE = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), _gate.weight)
            logits_TE[:, _removed] = -torch.inf
            weights_TK, ids_TK = logits_TE.softmax(-1).topk(_gate.top_k)
            return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

        gate.forward = forward
    close(logits(model, inputs), logits(masked, inputs))


def test_a_group_limited_router_keeps_the_best_of_each_group():
    layers, table = layers_of("deepseek_v3"), statistics("deepseek_v3")
    groups = layers[0].router_constraints.num_groups
    assert groups > 1
    size = layers[0].num_experts // groups
    plan = METHODS["reap"](layers, table, experts=layers[0].num_experts // 2)
    for planned in plan.layers:
        assert len({sum(core // size == group for core in planned.cores) for group in range(groups)}) == 1
    with pytest.raises(ValueError, match=f"keep a multiple of {groups}"):
        METHODS["reap"](layers, table, experts=layers[0].num_experts - 1)


def test_scores_do_not_depend_on_batches_or_padding():
    model, inputs, _ = fresh_case("qwen3_moe")
    ids_BS = inputs["input_ids"]
    padded = torch.cat([ids_BS, torch.zeros_like(ids_BS[:, :3])], 1)
    mask_BS = torch.ones_like(padded)
    mask_BS[:, -3:] = 0
    with record_routing(model) as whole:
        logits(model, {"input_ids": ids_BS})
    with record_routing(model) as parts:
        for row in range(len(ids_BS)):
            logits(model, {"input_ids": padded[row : row + 1], "attention_mask": mask_BS[row : row + 1]})
    for layer in expert_layers(model):
        for name in WITH_DATA:
            one, other = (SCORES[name](layer, table.layers[layer.name]) for table in (whole, parts))
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_unseen_experts_are_named():
    table = copy.deepcopy(statistics("qwen3_moe"))
    name = next(iter(table.layers))
    table.layers[name].counts[2] = 0
    plan = METHODS["man"](layers_of("qwen3_moe"), table, experts=4)
    assert any(f"layer {name!r}: no token chose the experts" in note for note in plan.notes)


def test_scores_that_are_not_there():
    with pytest.raises(ValueError, match="score='x' is not one of frequency"):
        METHODS["reap"](layers_of("qwen3_moe"), statistics("qwen3_moe"), experts=4, score="x")
    table = copy.deepcopy(statistics("qwen3_moe"))
    next(iter(table.layers.values())).gated_output_norm_sums[1] = math.nan
    with pytest.raises(ValueError, match=r"a score of layer .* is NaN"):
        METHODS["reap"](layers_of("qwen3_moe"), table, experts=4)
