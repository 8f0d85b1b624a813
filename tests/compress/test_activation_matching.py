"""Activation matching: permuted copies are put back, functions stay, what cannot work is refused first."""

from functools import cache

import pytest
import torch
from moekit.compress.activation_matching import match_activations
from moekit.compress.alignment import permute_expert
from moekit.compress.apply import apply_plan
from moekit.compress.layer_plan import ExpertGroup, LayerPlan, keep_experts
from moekit.compress.m_smoe import plan_m_smoe
from moekit.compress.plan import AlignmentRule, CompressionPlan, ModelIdentity
from moekit.moe import InputSamples, LayerSample, expert_layers, neuron_activations, record_inputs
from torch import Tensor
from transformers import PreTrainedModel

from ..moe.samples import fresh_case as fresh
from ..moe.samples import logits
from .plan_samples import statistics

FAMILIES = ["qwen3_moe", "gpt_oss", "switch_transformers"]  # gated, gated with biases, plain
ACTIVATIONS = AlignmentRule(method="activations")


def many_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    # Fewer leave some of Switch's relu neurons active on one and the same token, which nothing tells apart.
    ids = torch.randint(3, 64, (16, 60), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {})


@cache
def recorded(family: str) -> InputSamples:
    """What the experts of the original read. Not to be changed."""
    model, _, _ = fresh(family)
    with record_inputs(model) as samples:
        logits(model, many_tokens(model))
    return samples


def run(layer, expert, inputs: Tensor) -> Tensor:
    return torch.nn.functional.linear(
        neuron_activations(layer, expert, inputs), expert.down, expert.down_bias
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shuffled_copy_is_put_back_exactly(family: str) -> None:
    model, _, _ = fresh(family)
    for layer in expert_layers(model):
        reference = layer.experts()[3]
        shuffled = permute_expert(reference, torch.randperm(reference.width))
        inputs = torch.randn(200, layer.hidden_size)
        aligned = permute_expert(shuffled, *match_activations(layer, shuffled, reference, inputs))
        for name, tensor in aligned.named_tensors():
            assert torch.equal(tensor, getattr(reference, name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str) -> None:
    model, _, _ = fresh(family)
    layer = expert_layers(model)[0]
    expert, reference, *_ = layer.experts()
    inputs = torch.randn(200, layer.hidden_size)
    alignment = match_activations(layer, expert, reference, inputs)
    assert alignment.permutation.tolist() != list(range(expert.width))
    new = torch.randn(50, layer.hidden_size)
    assert relative(run(layer, permute_expert(expert, *alignment), new), run(layer, expert, new)) < 1e-5


def test_neurons_are_matched_by_what_they_do_and_not_by_their_scale() -> None:
    model, _, _ = fresh("qwen3_moe")
    layer = expert_layers(model)[0]
    reference = layer.experts()[0]
    shuffle = torch.randperm(reference.width)
    scaled = permute_expert(reference, shuffle)
    scaled.up.mul_(torch.rand(reference.width, 1) * 10)
    inputs = torch.randn(200, layer.hidden_size)
    permutation, signs = match_activations(layer, scaled, reference, inputs)
    assert torch.equal(shuffle[permutation], torch.arange(reference.width))
    assert signs is None


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_too_few_tokens_leave_the_order(num_tokens: int) -> None:
    model, _, _ = fresh("qwen3_moe")
    layer = expert_layers(model)[0]
    expert, reference, *_ = layer.experts()
    inputs = torch.randn(num_tokens, layer.hidden_size)
    assert match_activations(layer, expert, reference, inputs).permutation.tolist() == list(range(16))


def permute_into(copied, source) -> None:
    """Make one expert a copy of another with its neurons in another order."""
    copied.copy_(permute_expert(source, torch.randperm(source.width)))


def pairs(layer, weights: tuple[float, float] = (0.7, 0.3)) -> LayerPlan:
    groups = tuple(
        ExpertGroup(experts=(e, e + 1), weights=weights, core=e, reference=e + 1) for e in range(0, 8, 2)
    )
    return LayerPlan(name=layer.name, num_experts=8, top_k=layer.top_k, groups=groups)


def plan_of(model: PreTrainedModel, make_layer=pairs, rule: AlignmentRule = ACTIVATIONS) -> CompressionPlan:
    layers = expert_layers(model)
    return CompressionPlan(
        model=ModelIdentity.of(layers),
        method="by hand",
        form="moekit",
        router="redirect",
        alignment=rule,
        layers=tuple(make_layer(layer) for layer in layers),
        requested_experts=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_permuted_copies_loses_nothing(family: str, dtype: torch.dtype) -> None:
    model, _, _ = fresh(family)
    for layer in expert_layers(model):
        experts = layer.experts()
        for e in range(0, 8, 2):
            permute_into(experts[e + 1], experts[e])
    inputs = many_tokens(model)
    with record_inputs(model) as samples:
        expected = logits(model, inputs)
    for layer in samples.layers.values():
        layer.inputs = layer.inputs.to(dtype)  # the experts' own dtype decides
    report = apply_plan(model, plan_of(model), samples=samples)
    assert {layer.num_physical_experts for layer in expert_layers(model)} == {4}
    assert relative(logits(model, inputs), expected) < 1e-5
    for row in report.values():
        assert row["aligned"] == 4
        assert row["distance_before"] > 0.5
        assert row["distance_after"] < (0.5 if family == "switch_transformers" else 1e-6)  # silent neurons


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_merged_and_run(family: str) -> None:
    model, inputs, _ = fresh(family)
    plan = plan_m_smoe(expert_layers(model), statistics(family), experts=3, alignment="activations")
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.alignment.method == "activations"
    report = apply_plan(model, again, samples=recorded(family))
    assert sum(row["aligned"] for row in report.values()) > 0
    assert logits(model, inputs).isfinite().all()


def test_only_tokens_that_either_expert_served_count() -> None:
    model, _, _ = fresh("qwen3_moe")
    samples = InputSamples(
        max_tokens=64,
        layers={
            layer.name: LayerSample(
                num_tokens=64,
                positions=torch.arange(64),
                inputs=torch.randn(64, layer.hidden_size),
                expert_ids=torch.tensor([[6, 7]]).repeat(64, 1),
            )
            for layer in expert_layers(model)
        },
    )
    plain, _, _ = fresh("qwen3_moe")
    apply_plan(plain, plan_of(plain, rule=AlignmentRule(method="none")))
    apply_plan(model, plan_of(model), samples=samples)
    merged, unaligned = (expert_layers(m)[0].experts() for m in (model, plain))
    for e in range(3):
        assert torch.equal(merged[e].up, unaligned[e].up)
    assert not torch.equal(merged[3].up, unaligned[3].up)


def test_bf16_stays_bf16() -> None:
    model, inputs, _ = fresh("gpt_oss")
    model = model.to(torch.bfloat16)
    apply_plan(model, plan_of(model), samples=recorded("gpt_oss"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, inputs).isfinite().all()


def changed(**changes) -> InputSamples:
    """The samples of Qwen3-MoE with something else in their last layer."""
    layers = dict(recorded("qwen3_moe").layers)
    name, known = layers.popitem()
    if changes:
        layers[name] = LayerSample(**{**vars(known), **changes})
    samples = InputSamples()
    samples.layers = layers  # past the checks of the constructor
    return samples


REFUSED = {
    "none": (
        lambda: None,
        r"alignment 'activations' needs samples .* `with record_inputs\(model\) as samples`",
    ),
    "a layer": (changed, r"hold no token of layer 'model.layers.2.mlp', whose experts the plan merges"),
    "width": (lambda: changed(inputs=torch.ones(960, 31)), "another model: hidden width 31 in layer"),
    "top-k": (lambda: changed(expert_ids=torch.ones(960, 1).long()), "another model: top_k 1 in layer"),
    "experts": (lambda: changed(expert_ids=torch.full((960, 2), 8)), "another model: expert 8 in layer"),
    "NaN": (
        lambda: changed(inputs=torch.full((960, 32), float("nan"))),
        "holds NaN or infinity; nothing was",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_samples_that_do_not_serve_touch_nothing(case: str) -> None:
    make, message = REFUSED[case]
    model, inputs, expected = fresh("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan_of(model), samples=make())
    assert {layer.num_physical_experts for layer in expert_layers(model)} == {8}
    assert torch.equal(logits(model, inputs), expected)


def test_layers_that_are_not_merged_need_no_sample() -> None:
    model, inputs, _ = fresh("qwen3_moe")
    names = [layer.name for layer in expert_layers(model)]
    plan = plan_of(
        model, lambda layer: pairs(layer) if layer.name == names[0] else keep_experts(layer.name, 8, 2)
    )
    samples = InputSamples(layers={names[0]: recorded("qwen3_moe").layers[names[0]]})
    apply_plan(model, plan, samples=samples)
    assert [layer.num_physical_experts for layer in expert_layers(model)] == [4, 8, 8]
    assert logits(model, inputs).isfinite().all()
