"""HC-SMoE: clusters of mean outputs."""

import pytest
import torch
from moekit.compress import METHODS, apply_plan, permute_expert
from moekit.compress.expert_outputs import mean_outputs
from moekit.compress.hc_smoe import cluster
from moekit.moe import expert_layers, record_inputs, record_routing

from ..moe.samples import close, fresh_case, logits
from .plan_samples import layers_of, statistics


def recorded(model, inputs):
    with record_routing(model) as table, record_inputs(model) as samples:
        logits(model, inputs)
    return table, samples


def test_features_are_the_means_of_what_the_layer_computes():
    model, inputs, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[1]
    _, samples = recorded(model, inputs)
    inputs_TD = samples.layers[layer.name].inputs
    features_ED = mean_outputs(layer, inputs_TD)
    for expert in range(layer.num_experts):
        ids_T1 = torch.full((len(inputs_TD), 1), expert)
        with torch.no_grad():
            outputs_TD = layer.run_experts(inputs_TD, ids_T1, torch.ones(len(inputs_TD), 1))
        torch.testing.assert_close(features_ED[expert].float(), outputs_TD.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6])
def test_exactly_as_many_clusters_as_asked_whatever_the_ties(num_groups):
    features_ED = torch.zeros(6, 3, dtype=torch.float64)
    assert len(cluster(features_ED, num_groups).unique()) == num_groups


def test_near_experts_share_a_cluster():
    features_ED = torch.tensor([[0.0], [10.0], [0.1], [10.1], [50.0]], dtype=torch.float64)
    assert cluster(features_ED, 3).tolist() == [0, 1, 0, 1, 2]
    assert cluster(features_ED, 3, alone=[2]).tolist() == [0, 0, 1, 0, 2]
    with pytest.raises(ValueError, match="do not hold 5 experts"):
        cluster(features_ED, 2, alone=[0, 1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        cluster(features_ED * torch.nan, 2)


@pytest.mark.parametrize(("method", "options"), [("hc-smoe", {}), ("ream", {"capacity": 1})])
def test_copies_of_experts_merge_without_loss(method, options):
    """Four experts and a copy of each, the copies' neurons in another order."""
    model, inputs, _ = fresh_case("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in expert_layers(model):
            experts = layer.experts()
            for expert in range(4):
                order = torch.randperm(experts[0].width, generator=generator)
                experts[expert + 4].copy_(permute_expert(experts[expert], order))
                layer.router.weight[expert + 4] = layer.router.weight[expert]
    expected = logits(model, inputs)
    table, samples = recorded(model, inputs)
    for known in table.layers.values():
        known.gated_output_norm_sums[:4] += 1e6  # so that the first four lead
    options = {"experts": 4, "router": "redirect", "alignment": "weights", **options}
    plan = METHODS[method](expert_layers(model), table, samples=samples, **options)
    for layer in plan.layers:
        assert sorted(group.experts for group in layer.groups) == [(e, e + 4) for e in range(4)]
    apply_plan(model, plan)
    close(logits(model, inputs), expected)


@pytest.mark.parametrize("method", ["hc-smoe", "ream"])
def test_all_experts_kept_is_the_identity(method):
    model, inputs, _ = fresh_case("qwen3_moe")
    table, samples = recorded(model, inputs)
    plan = METHODS[method](expert_layers(model), table, samples=samples, experts=8)
    assert all(layer.is_identity for layer in plan.layers)


@pytest.mark.parametrize("method", ["hc-smoe", "ream"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "olmoe"])
def test_families(method, family):
    model, inputs, _ = fresh_case(family)
    table, samples = recorded(model, inputs)
    layers = expert_layers(model)
    plan = METHODS[method](layers, table, samples=samples, experts=layers[0].num_experts // 2)
    for layer in plan.layers:
        assert sorted(e for g in layer.groups for e in g.experts) == list(range(layer.num_experts))
    apply_plan(model, plan, samples=samples)
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("method", ["hc-smoe", "ream"])
def test_samples_are_asked_for(method):
    with pytest.raises(ValueError, match=f"method '{method}' needs samples of what the experts"):
        METHODS[method](layers_of("qwen3_moe"), statistics("qwen3_moe"), experts=4)


def test_unknown_options():
    layers, table = layers_of("qwen3_moe"), statistics("qwen3_moe")
    with pytest.raises(ValueError, match="linkage='x' is not one of average"):
        METHODS["hc-smoe"](layers, table, experts=4, linkage="x")
    with pytest.raises(ValueError, match="weighting='x' is not one of frequency"):
        METHODS["hc-smoe"](layers, table, experts=4, weighting="x")
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        METHODS["ream"](layers, table, experts=4, capacity=0)
