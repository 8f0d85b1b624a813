"""Routing among groups: exact group probabilities, singletons unchanged, refused where it has no meaning."""

# T tokens, K active experts, E experts of the router, M groups

from pathlib import Path

import pytest
import torch
from moekit.moe import expert_layers, save_checkpoint
from moekit.moe.group_router import group_logits
from torch import Tensor

from .families import FAMILIES, tiny_inputs
from .samples import close, fresh, implement, logits, merged
from .tiny_models import Family

SOFTMAX = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_greedy", "qwen3_unnormalised", "granitemoe"]
UNEVEN = [0, 1, 0, 2, 0, 3, 2, 0]  # groups of 4, 1, 2 and 1 experts
VARIANTS = {
    "qwen3_unnormalised": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
    "deepseek_greedy": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {"num_key_value_heads": 4, "topk_method": "greedy", "routed_scaling_factor": 2.5},
    ),
}


def build(family: str):
    return VARIANTS[family]() if family in VARIANTS else fresh(family)


def slow_group_logits(logits_TE: Tensor, group_of_E: list[int], num_groups: int) -> Tensor:
    out = torch.empty(len(logits_TE), num_groups, dtype=logits_TE.dtype)
    for token, row in enumerate(logits_TE):
        for group in range(num_groups):
            out[token, group] = torch.stack([row[e] for e in range(8) if group_of_E[e] == group]).logsumexp(0)
    return out


def test_group_logits_are_the_slow_reference() -> None:
    logits_TE = torch.randn(20, 8, dtype=torch.float64) * 500
    actual = group_logits(logits_TE, torch.tensor(UNEVEN), 4)
    torch.testing.assert_close(actual, slow_group_logits(logits_TE, UNEVEN, 4))


def test_a_groups_probability_is_the_sum_of_its_experts() -> None:
    logits_TE = torch.randn(20, 8, dtype=torch.float64) * 5
    shares_TE = logits_TE.softmax(-1)
    expected = torch.zeros(20, 4, dtype=torch.float64).index_add(1, torch.tensor(UNEVEN), shares_TE)
    actual = group_logits(logits_TE, torch.tensor(UNEVEN), 4).softmax(-1)
    torch.testing.assert_close(actual, expected)


def test_group_logits_by_hand() -> None:
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    assert torch.allclose(
        group_logits(logits_TE, torch.tensor([0, 0, 1, 0]), 2).exp(), torch.tensor([[7.0, 3.0]])
    )


def test_group_logits_stand_huge_and_absent_logits() -> None:
    far = torch.tensor([[3e4, -3e4, 2e4, float("-inf")]])
    actual = group_logits(far, torch.tensor([0, 1, 1, 2]), 3)
    assert actual[0, 0] == 3e4
    assert torch.isfinite(actual).all()
    assert actual.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


def test_group_logits_have_the_right_gradient() -> None:
    logits_TE = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    group_of_E = torch.tensor(UNEVEN)
    assert torch.autograd.gradcheck(lambda x: group_logits(x, group_of_E, 4), logits_TE)


@pytest.mark.parametrize("family", SOFTMAX)
def test_groups_of_one_route_as_before(family: str) -> None:
    model, original = build(family), build(family)
    for layer in expert_layers(model):
        layer.replace_experts(layer.experts(), range(8), router="logsumexp")
        assert layer.router_mode == "logsumexp"
    close(logits(model, tiny_inputs(model)), logits(original, tiny_inputs(original)), 1e-6)


@pytest.mark.parametrize("family", SOFTMAX)
def test_routing_is_the_slow_reference(family: str) -> None:
    model = build(family)
    layer = expert_layers(model)[0]
    constraints = layer.router_constraints
    hidden_TD = torch.randn(30, layer.input_size)
    with torch.no_grad():
        before = layer.route(hidden_TD)
        assert before.router_logits is not None
        layer.replace_experts(layer.experts()[:4], UNEVEN, router="logsumexp")
        after = layer.route(hidden_TD)
    probabilities_TM = slow_group_logits(before.router_logits, UNEVEN, 4).softmax(-1)
    weights_TK, ids_TK = probabilities_TM.sort(-1, descending=True)
    weights_TK, ids_TK = weights_TK[:, : layer.top_k], ids_TK[:, : layer.top_k]
    if constraints.renormalises:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    assert torch.equal(after.expert_ids, ids_TK)
    torch.testing.assert_close(after.routing_weights, weights_TK * constraints.scale)


def test_the_rules_of_the_variants_are_seen() -> None:
    rules = {name: expert_layers(build(name))[0].router_constraints.group_rule for name in SOFTMAX}
    assert rules["qwen3_moe"] == {"renormalises": True, "scale": 1.0}
    assert rules["qwen3_unnormalised"] == {"renormalises": False, "scale": 1.0}
    assert rules["deepseek_greedy"] == {"renormalises": False, "scale": 2.5}


def test_the_scale_is_exact_in_bfloat16() -> None:
    for family, scale in (("deepseek_greedy", 2.5), ("qwen3_moe", 1.0), ("openai_privacy_filter", 0.5)):
        assert expert_layers(build(family).bfloat16())[0].router_constraints.scale == scale


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_reach_every_row_of_the_router(family: str, training: bool) -> None:
    model = merged(family, router="logsumexp").train(training)
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in expert_layers(model):
        assert layer.router.weight.grad.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v3", "scoring='sigmoid', correction bias: True, groups: 2"),
        ("flint", "scoring='sigmoid', correction bias: False, groups: 1"),
        ("ernie4_5_moe", "scoring='softmax', correction bias: True, groups: 1"),
        ("deepseek_v2", "scoring='softmax', correction bias: False, groups: 2"),
        ("gemma4", "scoring='other'"),
        ("dbrx", r"a router that returns \(logits, weights, ids\)"),
        ("jetmoe", r"a router that returns \(logits, weights, ids\)"),
        ("switch_transformers", r"a router that returns \(logits, weights, ids\)"),
    ],
)
def test_other_routers_are_refused_untouched(family: str, reason: str) -> None:
    model = fresh(family)
    layer = expert_layers(model)[0]
    with pytest.raises(ValueError, match=rf"(?s){reason}.*use router='redirect'"):
        layer.replace_experts(layer.experts()[:4], [e % 4 for e in range(8)], router="logsumexp")
    assert layer.num_physical_experts == 8
    assert torch.equal(logits(model, tiny_inputs(model)), logits(fresh(family), tiny_inputs(model)))


def test_every_softmax_family_serves_groups_of_one() -> None:
    """What `router_constraints` lets pass must work, in every family."""
    served = 0
    for family in FAMILIES:
        model = fresh(family)
        try:
            for layer in expert_layers(model):
                layer.replace_experts(layer.experts(), range(layer.num_experts), router="logsumexp")
        except ValueError:
            continue
        close(logits(model, tiny_inputs(model)), logits(fresh(family), tiny_inputs(model)))
        served += 1
    assert served >= 25


def test_fewer_groups_than_top_k_are_refused() -> None:
    layer = expert_layers(fresh("qwen3_moe"))[0]
    with pytest.raises(ValueError, match="cannot choose top_k=2 of 1 groups"):
        layer.replace_experts(layer.experts()[:1], [0] * 8, router="logsumexp")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_merging_groups_joins_them(implementation: str) -> None:
    twice, once = (implement(fresh("qwen3_moe"), implementation) for _ in range(2))
    for layer, other in zip(expert_layers(twice), expert_layers(once), strict=True):
        other.replace_experts(layer.experts()[:2], [[0, 1, 1, 0][g] for g in UNEVEN], router="logsumexp")
        layer.replace_experts(layer.experts()[:4], UNEVEN, router="logsumexp")
        assert layer.num_experts == 4
        layer.replace_experts(layer.experts()[:2], [0, 1, 1, 0], router="logsumexp")
        assert layer.router.expert_group.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert torch.equal(logits(twice, tiny_inputs(twice)), logits(once, tiny_inputs(once)))


def test_a_redirected_layer_can_route_by_group_instead() -> None:
    model, direct = merged("qwen3_moe"), merged("qwen3_moe", router="logsumexp")
    for layer in expert_layers(model):
        layer.replace_experts(layer.experts(), [0, 1, 2, 3] * 2, router="logsumexp")
        assert layer.expert_map is None
    assert torch.equal(logits(model, tiny_inputs(model)), logits(direct, tiny_inputs(direct)))


def test_a_layer_of_groups_is_neither_redirected_nor_cut() -> None:
    layer = expert_layers(merged("qwen3_moe", router="logsumexp"))[0]
    with pytest.raises(ValueError, match="routes among groups already"):
        layer.replace_experts(layer.experts()[:2], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="routes among 4 groups by several router rows each"):
        layer.remove_experts([0, 1, 2])
    with pytest.raises(ValueError, match="router='mean' is not 'redirect' or 'logsumexp'"):
        layer.replace_experts(layer.experts(), range(4), router="mean")
    layer.replace_experts(layer.experts(), range(4))
    assert layer.router_mode == "logsumexp"


@pytest.mark.parametrize("family", SOFTMAX)
def test_it_saves_and_reloads_exactly(family: str, tmp_path: Path) -> None:
    model = build(family)
    for layer in expert_layers(model):
        layer.replace_experts(layer.experts()[:4], UNEVEN, router="logsumexp")
    inputs = tiny_inputs(model)
    assert save_checkpoint(model, tmp_path) == "moekit"
    again = type(model).from_pretrained(tmp_path).eval()
    for tensor in (*again.parameters(), *again.buffers()):
        tensor.data = tensor.data.clone()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    for layer, other in zip(expert_layers(model), expert_layers(again), strict=True):
        assert other.router_mode == "logsumexp"
        assert other.router.group_scale == layer.router.group_scale
        assert other.router.group_renormalises == layer.router.group_renormalises


AUX = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe", "qwen3_vl_moe", "jamba"]


@pytest.mark.parametrize("family", AUX)
def test_the_load_balancing_loss_is_that_of_the_routers_rows(family: str) -> None:
    """It reads the router's own logits, so merging by copies does not change it."""
    inputs = tiny_inputs(fresh(family))
    inputs |= {"labels": inputs["input_ids"]}

    def loss_of(model) -> Tensor:
        output = model.train()(**inputs, output_router_logits=True)
        output.loss.backward()
        assert {row.shape[-1] for row in output.router_logits} == {8}
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        return output.aux_loss.detach()

    same = {"redirect": fresh(family), "logsumexp": fresh(family)}
    for router, model in same.items():
        for layer in expert_layers(model):
            copy_of_first = [layer.experts()[0]] * 4
            layer.replace_experts(copy_of_first, [e % 4 for e in range(8)], router=router)
    copies = fresh(family)
    for layer in expert_layers(copies):
        layer.replace_experts([layer.experts()[0]] * 8, range(8))
    # Where all experts are one, neither the choice nor its merging changes hidden states.
    expected = loss_of(copies)
    close(loss_of(same["redirect"]), expected)
    if expert_layers(copies)[0].router_constraints.renormalises:
        close(loss_of(same["logsumexp"]), expected)
    else:
        assert torch.isfinite(loss_of(same["logsumexp"]))
