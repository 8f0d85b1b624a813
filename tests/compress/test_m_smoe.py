"""Planning M-SMoE and frequency pruning: groups follow from use and similarity; nothing is changed."""

import copy
import dataclasses

import pytest
import torch
from moekit.compress.grouping import assign_groups, dominant_experts
from moekit.compress.m_smoe import layer_similarity, plan_m_smoe
from moekit.compress.methods import METHODS
from moekit.compress.plan import CompressionPlan
from moekit.compress.similarity import output_similarity, router_logit_similarity
from moekit.moe.discovery import expert_layers
from moekit.moe.statistics import LayerStatistics, RoutingStatistics

from ..moe.samples import fresh_case as fresh
from .plan_samples import layers_of, statistics

FAMILIES = ["qwen3_moe", "gpt_oss", "switch_transformers"]


def plan_for(family: str = "qwen3_moe", method: str = "m-smoe", **options) -> CompressionPlan:
    options = options if {"experts", "ratio"} & options.keys() else {"experts": 4, **options}
    return METHODS[method](layers_of(family), statistics(family), **options)


def with_counts(counts: list[list[int]], family: str = "qwen3_moe") -> RoutingStatistics:
    """The family's statistics with other usage."""
    known = statistics(family)
    changed = {
        name: dataclasses.replace(layer, counts=torch.tensor(row))
        for (name, layer), row in zip(known.layers.items(), counts, strict=True)
    }
    return RoutingStatistics(layers=changed)


@pytest.mark.parametrize("similarity", ["router-logits", "weights", "outputs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_in_one_group_and_nothing_is_changed(family: str, similarity: str) -> None:
    model, _, _ = fresh(family)
    known = copy.deepcopy(statistics(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_m_smoe(layers_of(family), known, experts=4, similarity=similarity)
    for layer in plan.layers:
        assert sorted(e for group in layer.groups for e in group.experts) == list(range(layer.num_experts))
        assert all(sum(group.weights) == pytest.approx(1) for group in layer.groups)
    for name, tensor in layers_state(family).items():
        assert torch.equal(tensor, before[name])
    for name, layer in known.layers.items():
        for key, tensor in layer.tensors.items():
            assert torch.equal(tensor, statistics(family).layers[name].tensors[key])
    assert plan == plan_m_smoe(layers_of(family), known, experts=4, similarity=similarity)


def layers_state(family: str) -> dict[str, torch.Tensor]:
    """Parameters of the model that was planned for, by their names in it."""
    return {
        f"{layer.name}.{name}": tensor
        for layer in layers_of(family)
        for name, tensor in layer.block.state_dict().items()
    }


def test_groups_are_those_of_the_paper_and_weights_are_frequencies() -> None:
    plan = plan_for(grouping="uniform", experts=3)
    for planned, layer in zip(plan.layers, layers_of("qwen3_moe"), strict=True):
        known = statistics("qwen3_moe").layers[layer.name]
        cores = dominant_experts(known.counts, 3)
        group_of = assign_groups(router_logit_similarity(known.logit_gram), known.counts, cores)
        assert planned.group_of == group_of.tolist()
        assert planned.cores == cores.tolist()
        for group in planned.groups:
            total = sum(int(known.counts[e]) for e in group.experts)
            assert group.weights == pytest.approx([int(known.counts[e]) / total for e in group.experts])
            assert group.reference == group.core


def test_equal_weights_and_the_first_expert_as_reference() -> None:
    plan = plan_for(weighting="equal", reference="first", alignment="none")
    for group in (group for layer in plan.layers for group in layer.groups):
        assert group.weights == pytest.approx([1 / len(group.experts)] * len(group.experts))
        assert group.reference == 0
    assert plan.alignment.method == "none"


def test_a_group_that_nobody_used_weighs_its_members_equally() -> None:
    known = with_counts([[9, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [1] * 8])
    plan = plan_m_smoe(layers_of("qwen3_moe"), known, experts=4, grouping="uniform")
    for group in plan.layers[0].groups:
        share = [float(e == 0) for e in group.experts] if 0 in group.experts else None
        assert group.weights == pytest.approx(share or [1 / len(group.experts)] * len(group.experts))


@pytest.mark.parametrize("family", FAMILIES)
def test_adaptive_counts_meet_the_total_and_follow_use(family: str) -> None:
    layers = layers_of(family)
    plan = plan_for(family, experts=3)
    assert plan.requested_experts == plan.actual_experts == 3 * len(layers)
    assert all(layer.num_kept >= layer.top_k for layer in plan.layers)
    spread = [[5] * 8, [40, 0, 0, 0, 0, 0, 0, 0], [40, 0, 0, 0, 0, 0, 0, 0]]
    if len(layers) == 3:
        plan = plan_m_smoe(layers, with_counts(spread, family), experts=4)
        assert [layer.num_kept for layer in plan.layers] == [8, 2, 2]


def test_strict_ties_are_the_papers_and_may_miss_the_total() -> None:
    known = with_counts([[5] * 8] * 3)
    plan = plan_m_smoe(layers_of("qwen3_moe"), known, experts=4, ties="strict")
    assert (plan.requested_experts, plan.actual_experts) == (12, 6)


def test_experts_and_ratio_say_the_same() -> None:
    by_ratio, by_number = plan_for(ratio=0.5), plan_for(experts=4)
    assert by_ratio.layers == by_number.layers
    assert (by_ratio.settings["ratio"], by_number.settings["experts"]) == (0.5, 4)


@pytest.mark.parametrize("grouping", ["adaptive", "uniform", "random"])
def test_all_experts_or_the_whole_ratio_is_the_identity(grouping: str) -> None:
    for options in ({"experts": 8}, {"ratio": 1.0}):
        assert all(layer.is_identity for layer in plan_for(grouping=grouping, **options).layers)


def test_random_groups_follow_the_seed_and_are_led_by_the_most_used() -> None:
    plans = [plan_for(grouping="random", seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].layers != plans[2].layers
    assert len({tuple(layer.group_of) for layer in plans[0].layers}) == 3
    for layer in plans[0].layers:
        counts = statistics("qwen3_moe").layers[layer.name].counts
        for group in layer.groups:
            assert counts[group.core] == max(counts[e] for e in group.experts)


def test_excluded_layers_stay_and_count_with_all_their_experts() -> None:
    plan = plan_for(exclude_layers=[0])
    assert plan.layers[0].is_identity
    assert plan.requested_experts == plan.actual_experts == 8 + 4 + 4
    assert plan.notes == ("layer 'model.layers.0.mlp' is excluded and stays as it is",)


def test_layers_that_never_ran_stay_with_a_note() -> None:
    silent = RoutingStatistics(layers=dict(list(statistics("qwen3_moe").layers.items())[1:]))
    for grouping in ("adaptive", "uniform"):
        plan = plan_m_smoe(layers_of("qwen3_moe"), silent, experts=4, grouping=grouping)
        assert plan.layers[0].is_identity
        assert plan.actual_experts == 16
        assert plan.notes == ("layer 'model.layers.0.mlp' saw no token and stays as it is",)


def test_capacity_bounds_the_groups() -> None:
    for layer in plan_for(grouping="uniform", capacity=2).layers:
        assert [len(group.experts) for group in layer.groups] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="capacity=1 is too small for 8 experts in 4 groups"):
        plan_for(grouping="uniform", capacity=1)


def test_weight_similarity_sees_through_permuted_neurons() -> None:
    model, _, _ = fresh("qwen3_moe")
    layer = expert_layers(model)[0]
    source, copied = layer.experts()[2], layer.experts()[5]
    order = torch.randperm(source.width)
    for name, tensor in copied.named_tensors():
        original = getattr(source, name)
        tensor.copy_(original[:, order] if name == "down" else original[order])
    known = dataclasses.replace(
        statistics("qwen3_moe").layers[layer.name], counts=torch.tensor([0, 0, 9, 0, 0, 1, 0, 0])
    )
    aligned = layer_similarity(layer, known, "weights")
    assert aligned[2, 5] == pytest.approx(1, abs=1e-6)
    assert layer_similarity(layer, known, "weights", align=False)[2, 5] < 0.9
    outputs = layer_similarity(layer, known, "outputs")
    torch.testing.assert_close(outputs, output_similarity(known.output_sums, known.counts))


def test_cut_rows_of_a_group_limited_router_keep_its_groups_equal() -> None:
    for router in ("slice", "mean"):
        plan = plan_for("deepseek_v3", grouping="uniform", router=router, form="stock")
        for layer in plan.layers:
            assert [core // 4 for core in layer.cores] == [0, 0, 1, 1]
            counts = statistics("deepseek_v3").layers[layer.name].counts
            assert set(layer.cores[:2]) == set(dominant_experts(counts[:4], 2).tolist())
    with pytest.raises(ValueError, match=r"cannot keep 5 of 8 .*chooses among 2 groups of one size"):
        plan_for("deepseek_v3", grouping="uniform", router="slice", experts=5)
    plan_for("deepseek_v3", router="redirect", experts=5)


def test_frequency_pruning_keeps_the_most_used() -> None:
    plan = plan_for(method="frequency", experts=3, form="stock")
    assert (plan.method, plan.router, plan.form) == ("frequency", "slice", "stock")
    for layer in plan.layers:
        counts = statistics("qwen3_moe").layers[layer.name].counts
        assert layer.cores == dominant_experts(counts, 3).tolist()
        assert len(layer.removed) == 5
    adaptive = plan_for(method="frequency", experts=3, grouping="adaptive", exclude_layers=[1])
    assert adaptive.actual_experts == 14
    assert adaptive.layers[1].is_identity


REFUSED = [
    ({"experts": 9}, r"experts=9 is not between 1 and 8 experts \(layer 'model.layers.0.mlp'\)"),
    ({"experts": 0}, r"experts=0 is not between 1 and 8 experts \(layer 'model.layers.0.mlp'\)"),
    ({"experts": 1}, "experts=1 of 8 experts .*fewer than its router selects, top_k=2; use experts=2"),
    ({"ratio": 0.1}, "ratio=0.1 keeps 1 of 8 experts .*top_k=2; use experts=2 or ratio=0.25 at least"),
    ({"ratio": 0.0}, r"ratio=0.0 is not a share in \(0, 1\]"),
    ({"ratio": 1.5}, r"ratio=1.5 is not a share in \(0, 1\]"),
    ({"ratio": float("nan")}, r"ratio=nan is not a share in \(0, 1\]"),
    ({"ratio": 0.5, "experts": 4}, "give either experts or ratio, got experts=4 and ratio=0.5"),
    ({"ratio": None}, "give either experts or ratio, got experts=None and ratio=None"),
    ({"exclude_layers": [3]}, "exclude_layers names layer 3; the MoE layers are 0 to 2"),
    ({"exclude_layers": [0, 1, 2]}, "no layer is left to compress: of 3, 3 are excluded"),
    (
        {"form": "stock", "router": "slice", "exclude_layers": [0], "grouping": "uniform"},
        "same number of experts",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_numbers_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "stock", "router": "slice"}, "grouping='adaptive' does not give; use grouping='uniform'"),
        ({"form": "stock", "grouping": "uniform"}, "router='redirect' keeps a row for every expert"),
        ({"form": "onnx"}, "form='onnx' is not one of"),
        ({"router": "x"}, "router='x' is not one of"),
        ({"grouping": "x"}, "grouping='x' is not one of adaptive, uniform, sensitivity, random"),
        ({"similarity": "x"}, "similarity='x' is not one of router-logits, weights, outputs"),
        ({"weighting": "x"}, "weighting='x' is not one of frequency, equal"),
        ({"reference": "x"}, "reference='x' is not one of dominant, first"),
        ({"alignment": "x"}, "alignment method 'x' is not one of"),
        ({"ties": "x"}, "ties='x' is not one of"),
    ],
)
def test_wrong_options_are_refused_before_work(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(**options)


def test_statistics_of_another_model_are_refused() -> None:
    layers, known = layers_of("qwen3_moe"), statistics("qwen3_moe")
    with pytest.raises(ValueError, match="the routing statistics are empty"):
        plan_m_smoe(layers, RoutingStatistics(), experts=4)
    with pytest.raises(ValueError, match="are of another model: it has no layer 'encoder"):
        plan_m_smoe(layers, statistics("switch_transformers"), experts=4)
    first = next(iter(known.layers))
    small = LayerStatistics.zeros(6, 32, 2)
    with pytest.raises(ValueError, match=f"6 experts in layer '{first}', which has 8"):
        plan_m_smoe(layers, RoutingStatistics(layers={**known.layers, first: small}), experts=4)


def test_a_router_without_logits_is_refused_with_the_way_out() -> None:
    known = statistics("qwen3_moe")
    silent = {
        n: dataclasses.replace(s, logit_gram=torch.zeros_like(s.logit_gram)) for n, s in known.layers.items()
    }
    blank = RoutingStatistics(layers=silent)
    with pytest.raises(ValueError, match=r"shows no router logits .*use similarity='weights' or 'outputs'"):
        plan_m_smoe(layers_of("qwen3_moe"), blank, experts=4)
    plan_m_smoe(layers_of("qwen3_moe"), blank, experts=4, similarity="outputs")
