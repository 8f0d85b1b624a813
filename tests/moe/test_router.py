"""What each family's router demands, how its rows are cut and mixed, and who counts experts."""

# T tokens, E experts, K active experts

import copy
import json
from pathlib import Path

import pytest
import torch
from moekit.moe import expert_layers, save_checkpoint, update_expert_count
from moekit.moe.checkpoint import configured_experts
from moekit.moe.router import RouterConstraints, mix_router_rows, router_top_k, set_config_count
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from .families import tiny_inputs
from .samples import close, fresh, logits, merged

# family: scoring, renormalises, correction bias, groups, groups for a token, scale
RULES = {
    "mixtral": ("softmax", True, False, 1, 1, 1.0),
    "qwen3_moe": ("softmax", True, False, 1, 1, 1.0),
    "olmoe": ("softmax", False, False, 1, 1, 1.0),
    "qwen2_moe": ("softmax", False, False, 1, 1, 1.0),
    "gpt_oss": ("softmax", True, False, 1, 1, 1.0),  # its bias is part of the logits
    "openai_privacy_filter": ("softmax", True, False, 1, 1, 0.5),
    "granitemoe": ("softmax", True, False, 1, 1, 1.0),
    "jamba": ("softmax", False, False, 1, 1, 1.0),
    "dbrx": ("softmax", True, False, 1, 1, 1.0),
    "jetmoe": ("softmax", True, False, 1, 1, 1.0),
    "switch_transformers": ("softmax", False, False, 1, 1, 1.0),
    "ernie4_5_moe": ("softmax", True, True, 1, 1, 1.0),
    "deepseek_v2": ("softmax", False, False, 2, 1, 1.0),
    "deepseek_v3": ("sigmoid", True, True, 2, 1, 2.5),
    "dots1": ("sigmoid", False, True, 2, 1, 1.0),
    "glm4_moe_lite": ("sigmoid", True, True, 1, 1, 1.8),
    "minimax_m2": ("sigmoid", True, True, 1, 1, 1.0),
    "lfm2_moe": ("sigmoid", True, True, 1, 1, 1.0),
    "flint": ("sigmoid", True, False, 1, 1, 1.0),
    "llama4": ("sigmoid", False, False, 1, 1, 1.0),
}


@pytest.mark.parametrize("family", RULES)
def test_the_rule_of_a_family(family: str) -> None:
    for model in (fresh(family), merged(family)):
        for layer in expert_layers(model):
            rule = layer.router_constraints
            assert (
                rule.scoring,
                rule.renormalises,
                rule.has_correction_bias,
                rule.num_groups,
                rule.topk_groups,
                rule.scale,
            ) == RULES[family]


def test_watching_a_router_leaves_the_model_as_it_was() -> None:
    layer = expert_layers(fresh("qwen3_moe").train())[0]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert layer.router_constraints.scoring == "softmax"
    assert torch.equal(torch.rand(3), expected)
    assert layer.block.training
    assert not layer.experts_module._forward_pre_hooks


@pytest.mark.parametrize("family", ["gemma4", "phimoe", "deepseek_v4", "longcat_flash", "inkling", "zaya"])
def test_rules_that_are_neither_are_called_other(family: str) -> None:
    assert expert_layers(fresh(family))[-1].router_constraints.scoring == "other"


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, 1, 1], "keep=[0, 1, 1] must name different experts of 0..7 (layer 'a.mlp')"),
        ([0, 8], "keep=[0, 8] must name different experts of 0..7 (layer 'a.mlp')"),
        ([-1, 2], "keep=[-1, 2] must name different experts of 0..7 (layer 'a.mlp')"),
        (
            [3],
            "cannot keep 1 of 8 experts in layer 'a.mlp': the router selects top_k=2; keep at least 2",
        ),
        (
            [],
            "cannot keep 0 of 8 experts in layer 'a.mlp': the router selects top_k=2; keep at least 2",
        ),
    ],
)
def test_refusals_of_any_router(keep: list[int], message: str) -> None:
    rule = RouterConstraints(scoring="softmax", renormalises=True, has_correction_bias=False)
    with pytest.raises(ValueError, match="keep") as error:
        rule.check(keep, num_experts=8, top_k=2, layer="a.mlp")
    assert str(error.value) == message


def grouped(topk_groups: int = 1) -> RouterConstraints:
    return RouterConstraints(
        scoring="sigmoid",
        renormalises=True,
        has_correction_bias=True,
        num_groups=2,
        topk_groups=topk_groups,
    )


@pytest.mark.parametrize("keep", [[0, 1, 2, 4], [0, 1, 2, 3], [4, 5, 0, 1], [0, 4, 1, 5], [0, 1, 4], [0, 4]])
def test_groups_must_stay_equal_and_large_enough(keep: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"routes within 2 groups of 4 experts and uses 1 .* and at least 2 of each"
    ):
        grouped().check(keep, num_experts=8, top_k=2, layer="a.mlp")


def test_a_groups_score_needs_two_experts() -> None:
    with pytest.raises(ValueError, match="at least 2 of each"):
        grouped(2).check([1, 6], num_experts=8, top_k=2, layer="a.mlp")
    with pytest.raises(ValueError, match="at least 4 of each"):
        grouped(1).check([0, 1, 4, 5], num_experts=8, top_k=4, layer="a.mlp")


def test_what_groups_allow() -> None:
    grouped().check([1, 3, 4, 6], num_experts=8, top_k=2, layer="a.mlp")
    grouped().check([3, 1, 6, 4], num_experts=8, top_k=2, layer="a.mlp")
    grouped(2).check([1, 2, 6, 7], num_experts=8, top_k=2, layer="a.mlp")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_refused_removal_changes_nothing(family: str) -> None:
    model = fresh(family)
    expected = logits(model, tiny_inputs(model))
    for layer in expert_layers(model):
        with pytest.raises(ValueError, match="layer 'model"):
            layer.remove_experts([0])
    assert torch.equal(logits(model, tiny_inputs(model)), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "olmoe", "minimax_m2", "ernie4_5_moe"])
def test_removed_experts_are_as_if_never_chosen(family: str) -> None:
    """Cutting rows equals logits of minus infinity in the uncut layer."""
    model = fresh(family)
    layer = expert_layers(model)[-1]
    keep = [6, 1, 4, 3]
    hidden_TD = torch.randn(20, layer.input_size)
    cut = expert_layers(copy.deepcopy(model))[-1]
    cut.remove_experts(keep)
    assert (cut.num_experts, cut.num_physical_experts, cut.router_mode) == (4, 4, "full")
    with torch.no_grad():
        expected = layer.route(hidden_TD).router_logits
        routing = cut.route(hidden_TD)
    assert expected is not None
    assert routing.router_logits is not None
    torch.testing.assert_close(routing.router_logits, expected[:, keep])
    assert routing.expert_ids.max() < 4


def test_removing_from_a_merged_layer_keeps_the_groups_weights() -> None:
    model, original = merged("qwen3_moe", 4), fresh("qwen3_moe")
    for layer, other in zip(expert_layers(model), expert_layers(original), strict=True):
        layer.remove_experts([5, 2, 7])
        assert layer.expert_map is None
        for kept, source in zip(layer.experts(), (1, 2, 3), strict=True):
            assert torch.equal(kept.up, other.experts()[source].up)
        assert torch.equal(layer.router.weight, other.router.weight[[5, 2, 7]])


def test_only_counts_of_routed_experts_are_counted_down() -> None:
    model = fresh("switch_transformers")
    for layer in expert_layers(model):
        layer.remove_experts([0, 2, 4])
        assert layer.router.num_experts == layer.router.classifier.out_features == 3
        assert layer.router.expert_capacity == 64
    zaya = expert_layers(fresh("zaya"))[0]
    widths = {n: m.out_features for n, m in zaya.router.named_modules() if hasattr(m, "out_features")}
    zaya.remove_experts(range(6))
    after = {n: m.out_features for n, m in zaya.router.named_modules() if hasattr(m, "out_features")}
    assert {n for n in widths if widths[n] != after[n]} == {n for n in widths if widths[n] == 9}
    assert zaya.router.num_router_classes == 7  # six experts and the way around them


def test_capacity_still_limits_a_cut_switch() -> None:
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_ff=16, d_kv=4, num_heads=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=3,
    )  # fmt: skip
    layer = expert_layers(SwitchTransformersForConditionalGeneration(config).eval())[0]
    layer.remove_experts([1, 2])
    with torch.no_grad():
        routing = layer.route(torch.randn(20, 16))
    served = routing.routing_weights != 0
    counts = routing.expert_ids[served].bincount(minlength=2)
    assert counts.max() == 3
    assert served.sum() < 20


def test_k_is_not_a_count_even_where_it_equals_e() -> None:
    class Router(torch.nn.Module):
        num_experts_per_tok = 4

    block = torch.nn.Module()
    block.num_experts_per_tok = 4  # pyright: ignore[reportArgumentType]
    assert router_top_k(Router(), block, None) == 4
    assert router_top_k(torch.nn.Module(), block, None) == 4


def slow_mix(tensor: Tensor, groups, axis: int) -> Tensor:
    rows, mixed = tensor.movedim(axis, 0), tensor.movedim(axis, 0).clone()
    for experts, weights, core in groups:
        mixed[core] = sum(weight * rows[e] for e, weight in zip(experts, weights, strict=True))
    return mixed.movedim(0, axis)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "minimax_m2"])
def test_mixing_rows_is_the_slow_reference(family: str) -> None:
    layer = expert_layers(fresh(family))[-1]
    groups = [([0, 2, 5], [0.5, 0.25, 0.25], 2), ([1], [1.0], 1), ([3, 4, 6, 7], [0.1, 0.2, 0.3, 0.4], 3)]
    named = {**dict(layer.block.named_parameters()), **dict(layer.block.named_buffers())}
    before = {
        name: tensor.clone()
        for name, tensor in named.items()
        if not name.startswith(("experts", "shared")) and 8 in tensor.shape
    }
    mix_router_rows(layer, groups)
    assert any("weight" in name for name in before)
    assert any("bias" in name for name in before) == (family != "qwen3_moe")
    for name, tensor in before.items():
        torch.testing.assert_close(named[name].detach(), slow_mix(tensor, groups, tensor.shape.index(8)))


def test_mixing_alone_rows_is_bit_identical() -> None:
    model = fresh("gpt_oss")
    expected = logits(model, tiny_inputs(model))
    for layer in expert_layers(model):
        mix_router_rows(layer, [([e], [1.0], e) for e in range(8)])
    assert torch.equal(logits(model, tiny_inputs(model)), expected)


@pytest.mark.parametrize(
    "family", ["qwen3_vl_moe", "qwen3_omni_moe", "dbrx", "step3p7", "deepseek_v3", "mixtral", "jamba"]
)
def test_the_new_count_reaches_every_spelling_of_nested_configs(family: str, tmp_path: Path) -> None:
    model = fresh(family)
    groups = expert_layers(model)[0].router_constraints.num_groups
    keep = [e for e in range(8) if e % (8 // groups) < 6 // groups]
    for layer in expert_layers(model):
        layer.remove_experts(keep)
    update_expert_count(model, 8, 6)
    assert configured_experts(model.config) == 6
    save_checkpoint(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())

    def counts(part: dict) -> set[int]:
        own = {v for k, v in part.items() if k.endswith(("num_experts", "local_experts", "routed_experts"))}
        inner = [v for v in part.values() if isinstance(v, dict)]
        return {count for count in own if count is not None}.union(*map(counts, inner))

    assert counts(saved) == {6}


def test_other_numbers_of_a_config_stay() -> None:
    config = copy.deepcopy(fresh("deepseek_v3").config)
    config.num_attention_heads = config.n_routed_experts
    set_config_count(config, 8, 5)
    assert (config.n_routed_experts, config.num_attention_heads, config.n_shared_experts) == (5, 8, 1)


def test_hash_tables_name_the_experts_that_serve_now() -> None:
    model = fresh("deepseek_v4")
    layer = next(layer for layer in expert_layers(model) if "tid2eid" in layer.router._buffers)
    table = layer.router.tid2eid.clone()
    layer.replace_experts(layer.experts()[:4], [0, 1, 2, 3] * 2)
    assert torch.equal(layer.router.tid2eid, table)
    layer.remove_experts([2, 0, 1])  # of the groups 2, 0 and 1; the experts 3 and 7 go
    served = {0: 1, 4: 1, 1: 2, 5: 2, 2: 0, 6: 0}
    for row, old in zip(layer.router.tid2eid.tolist(), table.tolist(), strict=True):
        for new, expert in zip(row, old, strict=True):
            assert new == served[expert] if expert in served else new in (0, 1, 2)
    close(logits(model, tiny_inputs(model)), logits(model, tiny_inputs(model)))
