"""Applying a plan: exact where it can be, the right shapes where not, and nothing touched if refused."""

import dataclasses

import pytest
import torch
from moekit.compress.apply import apply_plan
from moekit.compress.layer_plan import ExpertGroup, LayerPlan, keep_experts
from moekit.compress.m_smoe import plan_m_smoe
from moekit.compress.merging import merge_groups
from moekit.compress.methods import METHODS
from moekit.compress.plan import AlignmentRule, CompressionPlan, ModelIdentity
from moekit.moe.checkpoint import save_checkpoint
from moekit.moe.discovery import expert_layers
from moekit.moe.recording import record_routing

from ..moe.samples import fresh_case as fresh
from ..moe.samples import logits
from .plan_samples import statistics

FAMILIES = ["qwen3_moe", "gpt_oss", "switch_transformers"]
SOFTMAX = ["qwen3_moe", "gpt_oss", "olmoe"]  # only the last does not scale the chosen weights to sum 1


def planned(family: str, model, **options) -> CompressionPlan:
    return plan_m_smoe(expert_layers(model), statistics(family), **{"experts": 4, **options})


def plan_with(model, make_layer, **options) -> CompressionPlan:
    layers = expert_layers(model)
    defaults = {"method": "by hand", "form": "moekit", "router": "redirect", "requested_experts": 1}
    made = tuple(make_layer(layer) for layer in layers)
    return CompressionPlan(model=ModelIdentity.of(layers), layers=made, **{**defaults, **options})


def groups_for(layer, *members: tuple[int, ...]) -> LayerPlan:
    groups = tuple(
        ExpertGroup(experts=m, weights=(1 / len(m),) * len(m), core=m[0], reference=m[0]) for m in members
    )
    return LayerPlan(name=layer.name, num_experts=layer.num_experts, top_k=layer.top_k, groups=groups)


def reversed_singletons(layer) -> LayerPlan:
    return groups_for(layer, *((e,) for e in reversed(range(layer.num_experts))))


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("router", ["redirect", "slice", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_groups_as_experts_is_the_identity_bit_for_bit(family: str, router: str) -> None:
    model, inputs, expected = fresh(family)
    before = state(model)
    report = apply_plan(model, planned(family, model, experts=8, router=router))
    assert torch.equal(logits(model, inputs), expected)
    assert_untouched(model, before)
    assert {row["experts_after"] for row in report.values()} == {8}


@pytest.mark.parametrize("router", ["redirect", "slice", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_one_in_another_order_are_the_same_model(family: str, router: str) -> None:
    model, inputs, expected = fresh(family)
    first = [expert.up.clone() for expert in expert_layers(model)[0].experts()]
    apply_plan(model, plan_with(model, reversed_singletons, router=router))
    moved = [expert.up for expert in expert_layers(model)[0].experts()]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(moved), strict=True))
    close(logits(model, inputs), expected)


@pytest.mark.parametrize("family", SOFTMAX)
def test_logsumexp_of_groups_of_one_is_the_same_model(family: str) -> None:
    model, inputs, expected = fresh(family)
    apply_plan(model, plan_with(model, reversed_singletons, router="logsumexp"))
    assert {layer.router_mode for layer in expert_layers(model)} == {"logsumexp"}
    close(logits(model, inputs), expected)


def permute_into(copied, source) -> None:
    """Make one expert a copy of another with its neurons in another order."""
    order = torch.randperm(source.width)
    for name, tensor in copied.named_tensors():
        original = getattr(source, name)
        if name == "down":
            tensor.copy_(original[:, order])
        else:
            tensor.copy_(original if name == "down_bias" else original[order])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_permuted_copies_loses_nothing(family: str, weights: tuple[float, float]) -> None:
    model, inputs, _ = fresh(family)
    for layer in expert_layers(model):
        experts = layer.experts()
        for e in range(0, 8, 2):
            permute_into(experts[e + 1], experts[e])
    expected = logits(model, inputs)
    pairs = [
        ExpertGroup(experts=(e, e + 1), weights=weights, core=e, reference=e + 1) for e in range(0, 8, 2)
    ]

    def pair_up(layer) -> LayerPlan:
        return LayerPlan(name=layer.name, num_experts=8, top_k=layer.top_k, groups=tuple(pairs))

    unaligned, _, _ = fresh(family)
    unaligned.load_state_dict(model.state_dict())
    report = apply_plan(model, plan_with(model, pair_up))
    close(logits(model, inputs), expected)
    for row in report.values():
        assert row["aligned"] == 4
        assert row["distance_before"] > 0.5
        assert row["distance_after"] == 0
    apply_plan(unaligned, plan_with(unaligned, pair_up, alignment=AlignmentRule(method="none")))
    assert (logits(unaligned, inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("reference", ["dominant", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_experts_are_those_of_merge_groups(family: str, reference: str) -> None:
    model, _, _ = fresh(family)
    plan = planned(family, model, experts=3, reference=reference)
    wanted = {}
    for layer, row in zip(expert_layers(model), plan.layers, strict=True):
        if not row.is_identity:
            group_of, counts = torch.tensor(row.group_of), statistics(family).layers[layer.name].counts
            wanted[layer.name] = merge_groups(
                layer.experts(), group_of, counts, row.cores, reference=reference
            )
    assert wanted
    apply_plan(model, plan)
    for layer in expert_layers(model):
        for expert, other in zip(layer.experts(), wanted.get(layer.name, layer.experts()), strict=True):
            for name, tensor in expert.named_tensors():
                torch.testing.assert_close(tensor, getattr(other, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_redirect_keeps_all_rows_and_any_number_of_experts(family: str) -> None:
    model, inputs, expected = fresh(family)
    plan = planned(family, model, experts=3)
    rows = [layer.router.state_dict() for layer in expert_layers(model)]
    report = apply_plan(model, plan)
    for layer, row, before in zip(expert_layers(model), plan.layers, rows, strict=True):
        assert (layer.num_experts, layer.num_physical_experts) == (8, row.num_kept)
        assert layer.expert_map is None or layer.expert_map.tolist() == row.expert_map
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.router.state_dict().items())
        assert report[layer.name]["experts_after"] == row.num_kept
    actual = logits(model, inputs)
    assert actual.isfinite().all()
    assert not torch.allclose(actual, expected, atol=1e-4)


def router_rows(layer) -> torch.Tensor:
    return next(p for p in layer.router.parameters() if p.ndim == 2).detach().clone()


@pytest.mark.parametrize("form", ["moekit", "stock"])
@pytest.mark.parametrize("router", ["slice", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_routers_hold_one_row_for_each_group(family: str, router: str, form: str, tmp_path) -> None:
    model, inputs, _ = fresh(family)
    plan = planned(family, model, grouping="uniform", router=router, form=form)
    before = [router_rows(layer) for layer in expert_layers(model)]
    apply_plan(model, plan)
    for layer, row, rows in zip(expert_layers(model), plan.layers, before, strict=True):
        assert (layer.num_experts, layer.num_physical_experts, layer.expert_map) == (4, 4, None)
        for after, group in zip(router_rows(layer), row.groups, strict=True):
            shares = torch.tensor(group.weights).unsqueeze(1)
            mixed = (rows[list(group.experts)] * shares).sum(0)
            torch.testing.assert_close(after, rows[group.core] if router == "slice" else mixed)
    assert logits(model, inputs).isfinite().all()
    assert save_checkpoint(model, tmp_path) == form
    again = type(model).from_pretrained(tmp_path).eval()
    close(logits(again, inputs), logits(model, inputs))


def test_cut_routers_may_differ_in_size_in_the_moekit_form(tmp_path) -> None:
    model, inputs, _ = fresh("qwen3_moe")
    sizes = iter([3, 5, 8])
    plan = plan_with(model, lambda layer: keep_experts(layer.name, 8, 2, range(next(sizes))), router="slice")
    apply_plan(model, plan)
    assert [layer.num_experts for layer in expert_layers(model)] == [3, 5, 8]
    assert save_checkpoint(model, tmp_path) == "moekit"
    again = type(model).from_pretrained(tmp_path).eval()
    close(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", SOFTMAX)
def test_logsumexp_routes_by_the_sum_of_probabilities(family: str) -> None:
    model, inputs, _ = fresh(family)
    layer = expert_layers(model)[0]
    hidden = torch.randn(5, layer.input_size)
    with torch.no_grad():
        before = layer.route(hidden)
    plan = planned(family, model, experts=3, grouping="uniform", router="logsumexp")
    apply_plan(model, plan)
    layer = expert_layers(model)[0]
    with torch.no_grad():
        after = layer.route(hidden)
    probabilities = before.router_logits.softmax(-1)
    summed = torch.stack([probabilities[:, list(g.experts)].sum(-1) for g in plan.layers[0].groups], -1)
    chosen, ids = summed.topk(2, dim=-1)
    assert torch.equal(after.expert_ids, ids)
    if family != "olmoe":
        chosen = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(after.routing_weights, chosen)
    assert (layer.num_experts, layer.num_physical_experts) == (3, 3)
    assert logits(model, inputs).isfinite().all()


def test_pruning_drops_experts_and_their_rows() -> None:
    model, inputs, _ = fresh("qwen3_moe")
    plan = METHODS["frequency"](expert_layers(model), statistics("qwen3_moe"), experts=3, form="stock")
    kept = [
        [layer.experts()[e].up.clone() for e in row.cores]
        for layer, row in zip(expert_layers(model), plan.layers, strict=True)
    ]
    report = apply_plan(model, plan)
    for layer, ups in zip(expert_layers(model), kept, strict=True):
        assert all(torch.equal(expert.up, up) for expert, up in zip(layer.experts(), ups, strict=True))
        assert report[layer.name]["aligned"] == 0
        assert report[layer.name]["distance_before"] is None
    assert model.config.num_experts == 3
    assert logits(model, inputs).isfinite().all()


def test_a_group_limited_router_can_be_cut() -> None:
    model, inputs, _ = fresh("deepseek_v3")
    apply_plan(model, planned("deepseek_v3", model, grouping="uniform", router="slice", form="stock"))
    assert logits(model, inputs).isfinite().all()
    assert model.config.n_routed_experts == 4


@pytest.mark.parametrize("router", ["redirect", "slice", "logsumexp"])
def test_a_compressed_model_can_be_recorded(router: str) -> None:
    model, inputs, _ = fresh("qwen3_moe")
    apply_plan(model, planned("qwen3_moe", model, grouping="uniform", router=router))
    with record_routing(model) as recorded:
        logits(model, inputs)
    num_experts = 8 if router == "redirect" else 4
    for layer in recorded.layers.values():
        assert layer.counts.shape == (num_experts,)
        assert layer.counts.sum() == layer.num_tokens * 2


@pytest.mark.parametrize("router", ["redirect", "logsumexp"])
def test_a_merged_model_is_not_merged_again(router: str) -> None:
    model, inputs, _ = fresh("qwen3_moe")
    plan = planned("qwen3_moe", model, router=router)
    apply_plan(model, plan)
    between = logits(model, inputs)
    message = (
        rf"merged or replaced already \(router '{router}'\) and cannot be again; start from the original"
    )
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    with pytest.raises(ValueError, match=message):
        planned("qwen3_moe", model, similarity="weights")
    assert torch.equal(logits(model, inputs), between)


def test_a_cut_model_can_be_compressed_again() -> None:
    model, inputs, _ = fresh("qwen3_moe")
    apply_plan(model, planned("qwen3_moe", model, grouping="uniform", router="slice", form="stock"))
    with record_routing(model) as recorded:
        logits(model, inputs)
    apply_plan(model, plan_m_smoe(expert_layers(model), recorded, experts=3))
    assert sum(layer.num_physical_experts for layer in expert_layers(model)) == 9
    assert {layer.num_experts for layer in expert_layers(model)} == {4}
    assert logits(model, inputs).isfinite().all()


def test_alignment_brings_members_nearer() -> None:
    model, _, _ = fresh("qwen3_moe")
    report = apply_plan(model, planned("qwen3_moe", model, experts=2))
    for row in report.values():
        assert row["aligned"] > 0
        assert row["distance_after"] < row["distance_before"]


def test_bf16_stays_bf16() -> None:
    model, inputs, _ = fresh("gpt_oss")
    model = model.to(torch.bfloat16)
    apply_plan(model, planned("gpt_oss", model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, inputs).isfinite().all()


def test_a_plan_that_does_not_fit_touches_nothing() -> None:
    model, _, _ = fresh("qwen3_moe")
    before = state(model)
    plan = planned("qwen3_moe", model)
    last = dataclasses.replace(plan.layers[-1], name="model.layers.7.mlp")
    with pytest.raises(ValueError, match=r"names layer 'model.layers.7.mlp'"):
        apply_plan(model, dataclasses.replace(plan, layers=(*plan.layers[:-1], last)))
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_touch_nothing(value: float) -> None:
    model, _, _ = fresh("qwen3_moe")
    plan = planned("qwen3_moe", model)
    expert_layers(model)[2].experts()[5].down[0, 0] = value
    first = expert_layers(model)[0].experts()[0].up.clone()
    with pytest.raises(
        ValueError, match=r"down of expert 5 in layer 'model.layers.2.mlp' holds NaN or infinity"
    ):
        apply_plan(model, plan)
    assert {layer.num_physical_experts for layer in expert_layers(model)} == {8}
    assert torch.equal(expert_layers(model)[0].experts()[0].up, first)


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_is_asked_for(progress: bool, capsys) -> None:
    model, _, _ = fresh("qwen3_moe")
    apply_plan(model, planned("qwen3_moe", model), progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("merging" in captured.err) == progress
