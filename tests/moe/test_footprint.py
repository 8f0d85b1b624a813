"""The parts of a model add up to the model, and to its files."""

from pathlib import Path

import pytest
import torch
from moekit.moe import expert_layers, footprint, save_checkpoint
from moekit.moe.footprint import PARTS, expert_bytes, stored_tensors
from transformers import PreTrainedModel

from .families import FAMILIES
from .safetensors_size import tensor_bytes
from .samples import fresh, merged
from .tiny_models import Family


def measured(model: PreTrainedModel):
    return footprint(model, expert_layers(model))


def test_qwen3_moe_by_hand() -> None:
    parts = measured(fresh("qwen3_moe")).parameters
    # V=64, D=32, E=8, F=16, 3 layers, 4 query and 2 key-value heads of 8, untied
    assert parts == {
        "embeddings": 2 * 64 * 32,
        "attention": 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8),
        "routers": 3 * 8 * 32,
        "experts": 3 * 8 * 3 * 16 * 32,
        "shared experts": 0,
        "other": 3 * 2 * 32 + 32,
    }


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "jetmoe", "dbrx", "switch_transformers"]
)
def test_parts_add_up_to_the_models_parameters(family: str) -> None:
    model = fresh(family)
    parts = measured(model)
    buffers = {n for n, _ in model.named_buffers()}
    extra = sum(t.numel() for n, t in model.state_dict().items() if n in buffers and t.is_floating_point())
    assert list(parts.parameters) == list(parts.bytes) == list(PARTS)
    assert parts.total_parameters == model.num_parameters() + extra
    assert parts.total_bytes == sum(t.numel() * t.element_size() for t in stored_tensors(model).values())
    assert parts.to_dict() == {"parameters": parts.parameters, "bytes": parts.bytes}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_and_routers_are_told_apart_in_every_family(family: str) -> None:
    model = fresh(family)
    try:
        layers = expert_layers(model)
    except ValueError:
        return  # families that are refused
    parts = footprint(model, layers).parameters
    experts = sum(t.numel() for layer in layers for e in layer.experts() for _, t in e.named_tensors())
    norms = sum(
        p.numel()
        for layer in layers
        for n, p in layer.experts_module.named_parameters()
        if "post_expert" in n
    )
    weightless = sum(p.numel() for layer in layers for p in layer.router.parameters())
    assert weightless <= parts["routers"] < experts
    assert experts + norms <= parts["experts"] <= 1.3 * (experts + norms)
    assert min(parts["embeddings"], parts["attention"]) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_tensor_counts_once(tied: bool, tmp_path: Path) -> None:
    model = Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"tie_word_embeddings": tied})()
    assert measured(model).parameters["embeddings"] == (1 if tied else 2) * 64 * 32
    save_checkpoint(model, tmp_path)
    assert measured(model).total_bytes == tensor_bytes(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "deepseek_v4", "switch_transformers", "longcat_flash"]
)
def test_bytes_are_those_of_the_files(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = merged(family, 3).to(dtype)
    save_checkpoint(model, tmp_path, max_shard_size="30KB")
    assert measured(model).total_bytes == tensor_bytes(tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx", "switch_transformers"])
def test_merging_saves_whole_experts_and_costs_a_map(family: str) -> None:
    before, after = measured(fresh(family)), measured(merged(family, 3))
    layers = expert_layers(fresh(family))
    removed = sum(5 * expert_bytes(layer) for layer in layers)
    assert before.bytes["experts"] - after.bytes["experts"] == removed - 8 * 8 * len(layers)
    assert {part: n for part, n in before.bytes.items() if part != "experts"} == {
        part: n for part, n in after.bytes.items() if part != "experts"
    }


def test_shapes_alone_are_enough() -> None:
    """A model on the meta device, as large ones are looked at."""
    model = fresh("qwen3_moe")
    with torch.device("meta"):
        shapes = type(model)(model.config)
    assert measured(shapes).parameters == measured(model).parameters
