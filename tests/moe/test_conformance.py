"""One adapter contract for every MoE family of transformers, proved on tiny random models."""

# T tokens, K active experts, E logical experts, M physical experts

from pathlib import Path

import pytest
import torch
from moekit.moe import (
    ExpertLayer,
    ExpertWeights,
    UnsupportedModelError,
    expert_layers,
    footprint,
    record_routing,
    save_checkpoint,
    update_expert_count,
)
from moekit.moe.activations import expert_inputs, neuron_activations
from moekit.moe.discovery import REFUSED
from torch import Tensor
from transformers import PreTrainedModel

from .families import FAMILIES, UNSUPPORTED
from .safetensors_size import tensor_bytes
from .samples import fresh_case as fresh
from .samples import logits, original_case

_REFUSED_NAMES = {name.replace("-", "_") for name in REFUSED}
SUPPORTED = sorted(set(FAMILIES) - _REFUSED_NAMES)
ALWAYS_EAGER = {"dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers"}


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to float32 rounding, relative to the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def seen_by_experts(
    layer: ExpertLayer, model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights with which a layer's experts are called in the model's own forward."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with layer.observe(lambda hidden, ids, weights: seen.append((hidden, ids, weights))):
        logits(model, inputs)
    hidden, ids, weights = seen[0]
    return hidden.flatten(0, -2), *layer.as_choices(ids, weights)


def reference_expert(layer: ExpertLayer, expert: ExpertWeights, hidden: Tensor) -> Tensor:
    """One expert written out from its canonical weights and the family's own activation."""
    module = layer.experts_module
    inner = neuron_activations(layer, expert, hidden)
    out = torch.nn.functional.linear(inner, expert.down, expert.down_bias)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def merge_map(num_experts: int, num_kept: int) -> list[int]:
    return [expert % num_kept for expert in range(num_experts)]


def test_enough_families_are_covered() -> None:
    assert len(SUPPORTED) >= 45


def test_the_documentation_lists_the_covered_and_the_refused_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    covered, refused = text.split("## Refused")
    assert _first_column(covered) == SUPPORTED
    assert f"each of the {len(SUPPORTED)} families" in " ".join(covered.split())
    assert set(_first_column(refused)) == _REFUSED_NAMES


def _first_column(markdown: str) -> list[str]:
    rows = [line.split("|")[1].strip() for line in markdown.splitlines() if line.startswith("| ")]
    return [name for name in rows if name != "family"]


@pytest.mark.parametrize("family", SUPPORTED)
def test_writing_what_was_read_changes_nothing(family: str) -> None:
    model, inputs, expected = fresh(family)
    for layer in expert_layers(model):
        for expert in layer.experts():
            assert {t.shape[-1] for n, t in expert.named_tensors() if n in ("up", "gate")} == {
                expert.hidden_size
            }
        layer.replace_experts(layer.experts(), range(layer.num_experts))
        assert layer.expert_map is None
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("family", SUPPORTED)
def test_experts_are_views(family: str) -> None:
    model, inputs, expected = fresh(family)
    for layer in expert_layers(model):
        for expert in layer.experts():
            expert.down.zero_()
    assert not torch.allclose(logits(model, inputs), expected)


@pytest.mark.parametrize("family", SUPPORTED)
def test_route_is_the_models_own_routing(family: str) -> None:
    model, inputs, _ = original_case(family)
    for layer in expert_layers(model):
        calls: list[tuple[tuple, dict]] = []
        source = layer.router if layer.block_is_decoder_layer else layer.block
        handle = source.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        _, ids, weights = seen_by_experts(layer, model, inputs)
        handle.remove()
        args, kwargs = calls[0]
        hidden, *rest = (*args, *kwargs.values())
        extra = {}
        if rest and isinstance(rest[0], Tensor):
            name = "input_ids" if rest[0].dtype == torch.long else "prev_router_hidden_states"
            extra[name] = rest[0].flatten(0, 1)[None]
        with torch.no_grad():
            routing = layer.route(hidden.flatten(0, -2), **extra)
        assert routing.expert_ids.shape[1] == layer.top_k
        order, own_order = routing.expert_ids.argsort(-1), ids.argsort(-1)
        assert torch.equal(routing.expert_ids.gather(1, order), ids.gather(1, own_order))
        torch.testing.assert_close(routing.routing_weights.gather(1, order), weights.gather(1, own_order))
        assert routing.router_logits is not None
        assert routing.router_logits.shape == (len(ids), layer.num_experts)


@pytest.mark.parametrize("family", SUPPORTED)
def test_weighted_experts_add_up_to_the_layer(family: str) -> None:
    model, inputs, _ = original_case(family)
    for layer in expert_layers(model):
        hidden, ids, weights = seen_by_experts(layer, model, inputs)
        with torch.no_grad():
            actual = layer.run_experts(hidden, ids, weights)
            read = expert_inputs(layer, hidden, weights)
            scale_input = read is not hidden  # Llama-4
            expected = torch.zeros_like(actual)
            for index, expert in enumerate(layer.experts()):
                weight = (weights * (ids == index)).sum(-1, keepdim=True)
                chosen = (weight != 0).float()
                if scale_input:
                    expected += reference_expert(layer, expert, read) * chosen
                else:
                    expected += reference_expert(layer, expert, hidden) * weight
            expected += hidden * (weights * (ids >= layer.num_experts)).sum(-1, keepdim=True)  # LongCat
        close(actual.flatten(0, -2), expected.flatten(0, -2))


@pytest.mark.parametrize("family", SUPPORTED)
def test_permuting_experts_with_their_router_rows_changes_nothing(family: str) -> None:
    model, inputs, expected = fresh(family)
    for layer in expert_layers(model):
        groups = layer.router_constraints.num_groups
        size = layer.num_experts // groups
        layer.remove_experts([g * size + e for g in range(groups) for e in reversed(range(size))])
    close(logits(model, inputs), expected)


@pytest.mark.parametrize("family", SUPPORTED)
def test_permuting_neurons_changes_nothing(family: str) -> None:
    model, inputs, expected = fresh(family)
    for layer in expert_layers(model):
        for expert in layer.experts():
            order = torch.randperm(expert.width)
            for name, tensor in expert.named_tensors():
                if name == "down":
                    tensor.copy_(tensor[:, order].clone())
                elif name != "down_bias":
                    tensor.copy_(tensor[order].clone())
    close(logits(model, inputs), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_merged_layer_equals_replicated_experts(family: str, implementation: str) -> None:
    merged, inputs, original = fresh(family)
    replicated, _, _ = fresh(family)
    for model in (merged, replicated):
        if model._can_set_experts_implementation():
            model.set_experts_implementation(implementation)
        else:
            assert family in ALWAYS_EAGER
    for layer, twin in zip(expert_layers(merged), expert_layers(replicated), strict=True):
        experts = layer.experts()[: layer.num_experts // 2]
        mapping = merge_map(layer.num_experts, len(experts))
        twin.replace_experts([experts[m] for m in mapping], range(twin.num_experts))
        layer.replace_experts(experts, mapping)
        assert layer.num_physical_experts == len(experts)
        assert layer.expert_map is not None
        assert layer.expert_map.tolist() == mapping
    actual = logits(merged, inputs)
    close(actual, logits(replicated, inputs))
    assert not torch.allclose(actual, original, atol=1e-3)


@pytest.mark.parametrize("family", SUPPORTED)
def test_recording_counts_and_changes_nothing(family: str) -> None:
    model, inputs, expected = original_case(family)
    layers = expert_layers(model)
    with record_routing(model) as statistics:
        close(logits(model, inputs), expected)
    assert list(statistics.layers) == [layer.name for layer in layers]
    for layer in layers:
        _, ids, weights = seen_by_experts(layer, model, inputs)
        mask = inputs["attention_mask"].flatten().bool()
        mask = mask if len(mask) == len(ids) else torch.ones(len(ids), dtype=torch.bool)
        counted = [int(((ids == e) & (weights != 0))[mask].sum()) for e in range(layer.num_experts)]
        assert statistics.layers[layer.name].counts.tolist() == counted
        assert statistics.layers[layer.name].num_tokens == int(mask.sum())
        assert statistics.layers[layer.name].logit_gram.abs().sum() > 0


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Read a checkpoint back into aligned memory: a GEMM on memory-mapped tensors may round otherwise."""
    other = type(model).from_pretrained(folder).eval()
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data = tensor.data.clone()
    return other


@pytest.mark.parametrize("family", SUPPORTED)
def test_moekit_form_reloads_exactly_with_another_count_in_each_layer(family: str, tmp_path: Path) -> None:
    model, inputs, _ = fresh(family)
    for index, layer in enumerate(expert_layers(model)):
        num_kept = layer.num_experts // 2 if index % 2 else layer.num_experts - 2
        layer.replace_experts(layer.experts()[:num_kept], merge_map(layer.num_experts, num_kept))
    expected = logits(model, inputs)
    assert save_checkpoint(model, tmp_path / "once") == "moekit"
    assert footprint(model, expert_layers(model)).total_bytes == tensor_bytes(tmp_path / "once")
    once = reloaded(model, tmp_path / "once")
    assert torch.equal(logits(once, inputs), expected)
    assert save_checkpoint(once, tmp_path / "twice") == "moekit"
    assert torch.equal(logits(reloaded(model, tmp_path / "twice"), inputs), expected)


@pytest.mark.parametrize("family", [f for f in SUPPORTED if f != "jetmoe"])
def test_stock_form_reloads_exactly(family: str, tmp_path: Path) -> None:
    model, inputs, _ = fresh(family)
    for layer in expert_layers(model):
        groups, before = layer.router_constraints.num_groups, layer.num_experts
        size = before // groups
        keep = [e for e in range(before) if e % size < size - 2 // groups]
        layer.remove_experts(keep)
        assert layer.num_experts == layer.num_physical_experts == len(keep) == before - 2
    update_expert_count(model, before, len(keep))
    expected = logits(model, inputs)
    assert save_checkpoint(model, tmp_path) == "stock"
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert footprint(model, expert_layers(model)).total_bytes == tensor_bytes(tmp_path)
    assert torch.equal(logits(reloaded(model, tmp_path), inputs), expected)


@pytest.mark.parametrize("family", sorted({*UNSUPPORTED, *(set(FAMILIES) - set(SUPPORTED))}))
def test_families_that_cannot_be_served_are_refused_with_the_reason(family: str) -> None:
    model = {**FAMILIES, **UNSUPPORTED}[family]()
    with pytest.raises(UnsupportedModelError, match=r"is not supported: (its|in transformers)"):
        expert_layers(model)
