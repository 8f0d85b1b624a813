"""MoNE: experts that became constants."""

from dataclasses import replace

import pytest
import torch
from moekit.compress import METHODS, apply_plan
from moekit.compress.plan import LowRankRule
from moekit.moe import expert_layers, record_inputs, record_routing
from moekit.moe.checkpoint import max_logit_difference, save_checkpoint
from moekit.moe.footprint import footprint
from moekit.moe.statistics import LayerStatistics, RoutingStatistics
from moekit.scripts.prediction import predict_footprint
from moekit.scripts.record import layer_reports
from transformers import AutoModelForCausalLM

from ..moe.samples import close, fresh_case, logits

FUSED = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe", "granitemoe")


def recorded(model, inputs):
    with record_routing(model) as table, record_inputs(model) as samples:
        logits(model, inputs)
    return table, samples


def planned(model, inputs, method="mone", **options):
    table, samples = recorded(model, inputs)
    given = {} if method == "mone" else {"router": "constant"}
    return METHODS[method](expert_layers(model), table, **given, **options), {
        "statistics": table,
        "samples": samples,
    }


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("engine", ["eager", "grouped_mm"])
def test_a_constant_is_added_by_its_weight(family, engine):
    """The layer computed by hand: kept experts as they were, the others' table rows."""
    model, inputs, _ = fresh_case(family)
    model.set_experts_implementation(engine)
    layer, *_ = expert_layers(model)
    plan, seen = planned(model, inputs, experts=layer.num_experts // 2)
    kept = set(plan.layers[0].cores)
    table_ED = seen["statistics"].layers[layer.name].mean_output.float()
    inputs_TD = seen["samples"].layers[layer.name].inputs
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(len(inputs_TD), layer.num_experts, generator=generator).argsort(1)[:, : layer.top_k]
    weights_TK = torch.rand(ids_TK.shape, generator=generator)
    expected_TD = torch.zeros_like(inputs_TD)
    for k in range(layer.top_k):
        with torch.no_grad():
            ones = torch.ones(len(inputs_TD), 1)
            own_TD = layer.run_experts(inputs_TD, ids_TK[:, k : k + 1], ones)
        is_kept = torch.tensor([int(e) in kept for e in ids_TK[:, k]])[:, None]
        expected_TD += weights_TK[:, k : k + 1] * torch.where(is_kept, own_TD, table_ED[ids_TK[:, k]])
    apply_plan(model, plan, **seen)
    layer, *_ = expert_layers(model)
    with torch.no_grad():
        found_TD = layer.run_experts(inputs_TD, ids_TK, weights_TK)
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-5)
    assert layer.num_physical_experts == len(kept)


def test_an_expert_that_always_says_the_same_goes_without_loss():
    model, inputs, _ = fresh_case("gpt_oss")  # whose experts have biases
    with torch.no_grad():
        for layer in expert_layers(model):
            for expert in layer.experts()[:2]:
                expert.down.zero_()
    expected = logits(model, inputs)
    table, _ = recorded(model, inputs)
    layers = expert_layers(model)
    plan = METHODS["mone"](layers, table, experts=layers[0].num_experts - 2, protect=False)
    for planned_layer, layer in zip(plan.layers, layers, strict=True):
        known = table.layers[layer.name]
        score_E = known.output_deviation * known.counts
        assert score_E[planned_layer.removed].max() < 1e-3 * score_E.max()
    apply_plan(model, plan, statistics=table)
    close(logits(model, inputs), expected)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("method", ["mone", "reap"])
def test_saved_and_read_back_exactly(method, rank, tmp_path):
    model, inputs, _ = fresh_case("qwen3_moe")
    plan, seen = planned(model, inputs, method, experts=4)
    plan = replace(plan, low_rank=None if rank is None else LowRankRule(rank=rank, sparse_rows=0.25))
    foretold = predict_footprint(model, plan)
    apply_plan(model, plan, **seen)
    assert footprint(model, expert_layers(model)) == foretold
    assert save_checkpoint(model, tmp_path) == "moekit"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert max_logit_difference(model, again, inputs) == 0
    one, two = expert_layers(model)[0], expert_layers(again)[0]
    assert torch.equal(one.experts_module.constant_outputs, two.experts_module.constant_outputs)
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(layer.router.weight.grad.isfinite().all() for layer in expert_layers(again))


def test_outputs_of_constants_are_recorded_as_they_are():
    model, inputs, _ = fresh_case("qwen3_moe")
    plan, seen = planned(model, inputs, experts=4)
    apply_plan(model, plan, **seen)
    layer, *_ = expert_layers(model)
    removed = plan.layers[0].removed
    said = []
    with layer.observe_outputs(lambda ids, weights, outputs: said.append((ids, outputs))):
        logits(model, inputs)
    ids_TK, outputs_TKD = said[0]
    for place, expert in enumerate(removed):
        rows = outputs_TKD[ids_TK == expert]
        expected = layer.experts_module.constant_outputs[place].expand_as(rows)
        torch.testing.assert_close(rows, expected)


def test_what_cannot_be(tmp_path):
    model, inputs, _ = fresh_case("qwen3_moe")
    plan, seen = planned(model, inputs, experts=4)
    with pytest.raises(ValueError, match=r"need what the experts of layer .* said: run calibration text"):
        apply_plan(model, plan)
    other = {name: LayerStatistics.zeros(4, 8, 2) for name in seen["statistics"].layers}
    with pytest.raises(ValueError, match="statistics are of another model: 4 experts of width 8"):
        apply_plan(model, plan, statistics=RoutingStatistics(layers=other))
    table, _ = recorded(model, inputs)
    with pytest.raises(ValueError, match="form='stock' cannot hold"):
        METHODS["mone"](expert_layers(model), table, experts=4, form="stock")
    with pytest.raises(ValueError, match="for experts that are pruned, not merged"):
        METHODS["m-smoe"](expert_layers(model), table, experts=4, router="constant")
    with pytest.raises(ValueError, match="does not go with experts that are dropped"):
        METHODS["reap"](expert_layers(model), table, experts=4, router="redirect")
    apply_plan(model, plan, **seen)
    layer, *_ = expert_layers(model)
    with pytest.raises(ValueError, match="constant experts cannot be changed again"):
        layer.replace_experts(layer.experts(), [e % 4 for e in range(8)])
    with pytest.raises(ValueError, match="constant experts cannot be changed again"):
        layer.remove_experts([0, 1, 2])


@pytest.mark.parametrize("family", ["dbrx", "llama4"])
def test_families_whose_experts_are_not_fused(family):
    model, inputs, _ = fresh_case(family)
    table, _ = recorded(model, inputs)
    with pytest.raises(ValueError, match="are not fused as transformers fuses them"):
        METHODS["frequency"](expert_layers(model), table, experts=2, router="constant")


def test_the_report_calls_them_constant():
    model, inputs, _ = fresh_case("qwen3_moe")
    plan, seen = planned(model, inputs, experts=4)
    for planned_as, word in ((plan, "constant"), (replace(plan, router="slice"), "removed")):
        reports = layer_reports(planned_as, seen["statistics"])
        assert {report.fate for report in reports} == {word}
        assert reports[0].removed() == plan.layers[0].removed
