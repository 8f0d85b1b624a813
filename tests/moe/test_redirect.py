"""A merged layer is the layer of replicated experts: values, gradients, generation, and less work."""

# T tokens, K active experts, E logical experts, M physical experts

import copy

import pytest
import torch
from moekit.moe import expert_layers
from moekit.moe.redirect import fold_duplicates, redirect, repeated_share
from torch import Tensor

from .families import tiny_inputs
from .samples import close, fresh, implement, logits, merged, modulo_map, original_case, replicated

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def slow_fold(ids: list[list[int]], weights: list[list[float]], absent: int):
    for row, own in zip(ids, weights, strict=True):
        seen: dict[int, int] = {}
        for k, expert in enumerate(row):
            if expert in seen:
                own[seen[expert]] += own[k]
                row[k], own[k] = absent, 0.0
            else:
                seen[expert] = k
    return ids, weights


def test_fold_by_hand() -> None:
    ids, weights = fold_duplicates(
        torch.tensor([[1, 2, 1], [3, 3, 3], [0, 1, 2]]),
        torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]]),
        absent=4,
    )
    assert ids.tolist() == [[1, 2, 4], [3, 4, 4], [0, 1, 2]]
    assert weights.tolist() == [[0.625, 0.25, 0.0], [0.875, 0.0, 0.0], [0.5, 0.25, 0.125]]


@pytest.mark.parametrize(("num_choices", "num_experts"), [(1, 3), (2, 2), (4, 3), (8, 5)])
def test_fold_is_the_slow_reference(num_choices: int, num_experts: int) -> None:
    ids_TK = torch.randint(num_experts, (50, num_choices))
    weights_TK = torch.rand(50, num_choices, dtype=torch.float64)
    ids, weights = fold_duplicates(ids_TK, weights_TK, num_experts)
    slow_ids, slow_weights = slow_fold(ids_TK.tolist(), weights_TK.tolist(), num_experts)
    assert ids.tolist() == slow_ids
    torch.testing.assert_close(weights, torch.tensor(slow_weights, dtype=torch.float64))


def test_fold_passes_the_gradient_to_every_weight() -> None:
    ids_TK = torch.tensor([[1, 1, 0], [2, 1, 2]])
    weights_TK = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: fold_duplicates(ids_TK, w, 3)[1], weights_TK)


def test_fold_keeps_float32_under_autocast() -> None:
    ids_TK, weights_TK = torch.tensor([[1, 1, 0]]), torch.tensor([[0.1, 0.2, 0.3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, weights = fold_duplicates(ids_TK, weights_TK, 2)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.0, 0.3]]))


def shared_gradients(model, implementation: str, *, training: bool) -> dict[str, Tensor]:
    """Gradients of all weights; those of expert copies added up, as weight sharing does."""
    implement(model, implementation).train(training)
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"])
def test_gradients_are_those_of_shared_weights(family: str, implementation: str, training: bool) -> None:
    one, many = merged(family, 3), replicated(family, 3)
    actual = shared_gradients(one, implementation, training=training)
    expected = shared_gradients(many, implementation, training=training)
    assert actual.keys() == expected.keys()
    for layer, twin in zip(expert_layers(one), expert_layers(many), strict=True):
        mapping = torch.tensor(modulo_map(twin, 3))
        for name, parameter in twin.experts_module.named_parameters():
            summed = torch.zeros(3, *parameter.shape[1:]).index_add(0, mapping, parameter.grad)
            close(layer.experts_module.get_parameter(name).grad, summed)
            assert summed.abs().amax(tuple(range(1, summed.ndim))).gt(0).all()
        for name, parameter in twin.router.named_parameters():
            close(layer.router.get_parameter(name).grad, parameter.grad)
            assert parameter.grad.abs().sum() > 0
    for name, gradient in expected.items():
        if actual[name].shape == gradient.shape:
            close(actual[name], gradient)


@pytest.mark.parametrize("family", ["switch_transformers", "jetmoe", "dbrx"])
def test_gradients_of_the_special_families(family: str) -> None:
    one, many = merged(family, 3), replicated(family, 3)
    inputs = tiny_inputs(one)
    for model in (one, many):
        logits_BSV = model(**inputs).logits
        (logits_BSV * torch.linspace(-1, 1, logits_BSV.shape[-1])).sum().backward()
    for layer, twin in zip(expert_layers(one), expert_layers(many), strict=True):
        for name, parameter in twin.router.named_parameters():
            close(layer.router.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("qwen3_moe", "eager"),
        ("qwen3_moe", "grouped_mm"),
        ("gpt_oss", "grouped_mm"),
        ("gpt_oss", "batched_mm"),
    ],
)
def test_folded_choices_are_not_computed(family: str, implementation: str) -> None:
    model = implement(merged(family, 2), implementation)
    layer = expert_layers(model)[0]
    served: list[Tensor] = []
    # Registered last: sees what the experts get after the redirection.
    layer.experts_module.register_forward_pre_hook(lambda module, args: served.append(args[1]))
    chosen: list[Tensor] = []
    with layer.observe(lambda hidden, ids, weights: chosen.append(ids)):
        logits(model, tiny_inputs(model))
    mapped = [{e % 2 for e in row} for row in chosen[0].tolist()]
    assert int((served[0] < 2).sum()) == sum(len(experts) for experts in mapped)
    assert 0 < sum(len(experts) for experts in mapped) < served[0].numel()
    assert set(served[0].unique().tolist()) <= {0, 1, 2}


def test_rows_that_reach_the_experts_matrices() -> None:
    """In `eager` the linear layers get exactly one row for each token and distinct group."""
    model = implement(merged("qwen3_moe", 2), "eager")
    layer = expert_layers(model)[0]
    rows: list[int] = []
    inner = layer.experts_module.act_fn
    inner.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    chosen: list[Tensor] = []
    with layer.observe(lambda hidden, ids, weights: chosen.append(ids)):
        logits(model, tiny_inputs(model))
    assert sum(rows) == sum(len({e % 2 for e in row}) for row in chosen[0].tolist()) < chosen[0].numel()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "switch_transformers"])
def test_generation_is_that_of_replicated_experts(family: str) -> None:
    inputs = tiny_inputs(fresh(family))
    prompt = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    actual, expected, original = (
        model.generate(**prompt, **options)
        for model in (merged(family, 3), replicated(family, 3), fresh(family))
    )
    assert torch.equal(actual.sequences, expected.sequences)
    close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert not torch.allclose(torch.stack(actual.logits), torch.stack(original.logits), atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4", "jetmoe", "switch_transformers"])
def test_a_copy_of_a_merged_model_is_merged(family: str) -> None:
    model = merged(family)
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), expected)
    for layer, other in zip(expert_layers(model), expert_layers(twin), strict=True):
        assert layer.expert_map is not None
        assert other.expert_map is not None
        assert torch.equal(layer.expert_map, other.expert_map)
        assert layer.expert_map.data_ptr() != other.expert_map.data_ptr()
        other.replace_experts(other.experts()[:2], [0, 1] * 4)
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.allclose(logits(twin, inputs), expected)


def test_the_map_is_in_the_state_dict_and_is_read_back() -> None:
    model, other = merged("qwen3_moe"), fresh("qwen3_moe")
    state = model.state_dict()
    for layer in expert_layers(model):
        assert state[f"{layer.name}.experts.expert_map"].tolist() == [0, 1, 2, 3] * 2
    for layer in expert_layers(other):
        layer.replace_experts(layer.experts()[4:], [3, 2, 1, 0] * 2)
    other.load_state_dict(state, strict=True)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(other, inputs), logits(model, inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_merging_a_merged_layer_gives_its_logical_experts_a_new_map(implementation: str) -> None:
    model = implement(merged("qwen3_moe", 4), implementation)
    twin = implement(fresh("qwen3_moe"), implementation)
    second_map = [0, 1, 0, 1, 0, 1, 1, 0]
    for layer, other in zip(expert_layers(model), expert_layers(twin), strict=True):
        kept = layer.experts()[2:]
        other.replace_experts([kept[m] for m in second_map], range(8))
        layer.replace_experts(kept, second_map)
        assert (layer.num_experts, layer.num_physical_experts) == (8, 2)
        assert layer.experts_module.num_experts == 2
    close(logits(model, tiny_inputs(model)), logits(twin, tiny_inputs(twin)))


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4", "jetmoe", "switch_transformers", "longcat_flash"])
def test_the_identity_removes_map_and_hook(family: str) -> None:
    model, original = merged(family), fresh(family)
    for layer, other in zip(expert_layers(model), expert_layers(original), strict=True):
        layer.replace_experts(other.experts(), range(8))
        assert layer.expert_map is None
        module, untouched = layer.redirected_module, other.redirected_module
        assert "expert_map" not in module.state_dict()
        assert len(module._forward_pre_hooks) == len(untouched._forward_pre_hooks)
        assert len(module._forward_hooks) == len(untouched._forward_hooks)
        assert not module._forward_pre_hooks_with_kwargs
        assert not getattr(layer.experts_module, "_is_expert_parallel", False)
    assert torch.equal(logits(model, tiny_inputs(model)), logits(original, tiny_inputs(original)))


def test_the_hook_is_there_once_after_many_merges() -> None:
    layer = expert_layers(merged("qwen3_moe"))[0]
    for _ in range(3):
        layer.replace_experts(layer.experts(), [3, 2, 1, 0] * 2)
    hooks = list(layer.experts_module._forward_pre_hooks.values())
    assert hooks.count(redirect) == 1


@pytest.mark.parametrize("num_kept", [1, 2, 7])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_number_of_experts_down_to_fewer_than_top_k(num_kept: int, implementation: str) -> None:
    one = implement(merged("qwen3_moe", num_kept), implementation)
    many = implement(replicated("qwen3_moe", num_kept), implementation)
    close(logits(one, tiny_inputs(one)), logits(many, tiny_inputs(many)))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3"])
def test_folded_and_unfolded_choices_say_the_same(family, implementation, monkeypatch):
    _, inputs, _ = original_case(family)
    expected = logits(implement(replicated(family, 2), implementation), inputs)
    for worth in (0.0, 1.0):
        monkeypatch.setattr("moekit.moe.redirect.WORTH_FOLDING", worth)
        model = merged(family, 2)
        assert any(layer.experts_module._is_expert_parallel for layer in expert_layers(model)) == (worth == 0)
        close(logits(implement(model, implementation), inputs), expected)


def test_choices_are_folded_where_many_repeat():
    assert repeated_share(8, 1) == 0
    assert repeated_share(1, 4) == pytest.approx(0.75)
    assert repeated_share(4, 2) == pytest.approx(1 - 4 * (1 - 0.75**2) / 2)
    few, many = merged("qwen3_moe", 6), merged("qwen3_moe", 2)
    assert not any(layer.experts_module._is_expert_parallel for layer in expert_layers(few))
    assert all(layer.experts_module._is_expert_parallel for layer in expert_layers(many))
