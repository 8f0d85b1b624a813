"""Samples are bounded, free of padding, and the same whatever the batches and the interruptions."""

# B batch, S sequence, T sampled tokens

import json

import pytest
import torch
from moekit.moe import InputSamples, LayerSample, expert_layers, record_inputs, record_routing
from moekit.moe.activations import expert_inputs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .families import tiny_inputs
from .samples import close, fresh, implement, logits, merged
from .test_conformance import seen_by_experts

FAMILIES = ["qwen3_moe", "gpt_oss", "switch_transformers", "nemotron_h", "dbrx", "jetmoe", "gemma4"]
SPECIAL = ["llama4", "longcat_flash"]  # scaled inputs; experts without weights


def sample(model: PreTrainedModel, *batches: dict[str, Tensor], max_tokens: int = 2048) -> InputSamples:
    with record_inputs(model, samples=InputSamples(max_tokens=max_tokens)) as samples:
        for batch in batches:
            logits(model, batch)
    return samples


def same(actual: InputSamples, expected: InputSamples, tolerance: float = 1e-5) -> None:
    assert list(actual.layers) == list(expected.layers)
    for name, mine in actual.layers.items():
        theirs = expected.layers[name]
        assert mine.num_tokens == theirs.num_tokens
        assert torch.equal(mine.positions, theirs.positions)
        assert torch.equal(mine.expert_ids, theirs.expert_ids)
        close(mine.inputs, theirs.inputs, tolerance)


def batch_of(num_rows: int, length: int, seed: int = 1) -> dict[str, Tensor]:
    ids_BS = torch.randint(3, 64, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


def steady() -> PreTrainedModel:
    """In float64, so that nothing but the sample itself could differ; grouped_mm knows no float64."""
    return implement(fresh("qwen3_moe").double(), "eager")


@pytest.mark.parametrize("family", FAMILIES + SPECIAL)
def test_a_large_sample_is_all_that_the_experts_read(family: str) -> None:
    model = fresh(family)
    inputs = tiny_inputs(model)
    samples = sample(model, inputs)
    for layer in expert_layers(model):
        hidden, ids, weights = seen_by_experts(layer, model, inputs)
        mask = inputs["attention_mask"].flatten().bool()
        mask = mask if len(mask) == len(ids) else torch.ones(len(ids), dtype=torch.bool)
        mine = samples.layers[layer.name]
        served = (weights != 0) & (ids < layer.num_experts)
        assert mine.num_tokens == len(mine.positions) == int(mask.sum())
        assert torch.equal(mine.inputs, expert_inputs(layer, hidden, weights)[mask])
        assert torch.equal(mine.expert_ids, torch.where(served, ids, -1)[mask])


def test_choices_without_weights_are_marked() -> None:
    samples = sample(fresh("longcat_flash"), batch_of(4, 30))
    ids = torch.cat([layer.expert_ids for layer in samples.layers.values()])
    assert int(ids.min()) == -1
    assert int(ids.max()) == 7


def test_ids_are_logical_in_a_merged_layer() -> None:
    samples = sample(merged("qwen3_moe"), batch_of(4, 30))
    assert max(int(layer.expert_ids.max()) for layer in samples.layers.values()) == 7


def test_the_model_computes_the_same() -> None:
    model, batch = fresh("qwen3_moe"), batch_of(2, 9)
    expected = logits(model, batch)
    with record_inputs(model):
        assert torch.equal(logits(model, batch), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def mixed(position: int) -> int:
    """SplitMix64 with Python's integers, as a signed number."""
    bits = 2**64 - 1
    x = (position + 1) * 0x9E3779B97F4A7C15 & bits
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & bits
    x = (x ^ x >> 27) * 0x94D049BB133111EB & bits
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


def test_the_sample_is_bounded_and_those_with_the_lowest_numbers() -> None:
    model, batches = fresh("qwen3_moe"), [batch_of(3, 30, seed) for seed in range(4)]
    everything, some = sample(model, *batches), sample(model, *batches, max_tokens=50)
    wanted = sorted(sorted(range(360), key=mixed)[:50])
    for name, layer in some.layers.items():
        assert layer.num_tokens == 360
        assert layer.positions.tolist() == wanted
        assert torch.equal(layer.inputs, everything.layers[name].inputs[wanted])
        assert torch.equal(layer.expert_ids, everything.layers[name].expert_ids[wanted])


def test_the_sample_is_spread_over_all_batches() -> None:
    model, batches = fresh("qwen3_moe"), [batch_of(8, 50, seed) for seed in range(4)]
    layer = next(iter(sample(model, *batches, max_tokens=200).layers.values()))
    shares = (layer.positions // 400).bincount(minlength=4)
    assert ((shares > 30) & (shares < 70)).all()


@pytest.mark.parametrize("max_tokens", [7, 2048])
def test_a_batch_split_changes_nothing(max_tokens: int) -> None:
    model, whole = steady(), batch_of(6, 9)
    parts = [{name: tensor[i : i + 2] for name, tensor in whole.items()} for i in (0, 2, 4)]
    expected = sample(model, whole, max_tokens=max_tokens)
    same(sample(model, *parts, max_tokens=max_tokens), expected, 1e-12)
    same(sample(model, whole, max_tokens=max_tokens), expected, 0.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_sampled(side: str) -> None:
    model, lengths = steady(), [9, 1, 4]
    rows = batch_of(3, 9)["input_ids"]
    padded, mask = torch.randint(3, 64, (3, 12)), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(12 - length, 12)
        padded[row, place], mask[row, place] = rows[row, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = sample(model, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})
    same(together, sample(model, *({"input_ids": rows[i : i + 1, :n]} for i, n in enumerate(lengths))), 1e-9)
    nothing = {"input_ids": padded, "attention_mask": torch.zeros_like(mask)}
    assert sample(model, nothing).layers == {}


@pytest.mark.parametrize("max_tokens", [20, 2048])
def test_an_interrupted_recording_goes_on_as_if_it_had_not_been(max_tokens: int, tmp_path) -> None:
    model, batches = fresh("qwen3_moe"), [batch_of(2, 20, seed) for seed in range(3)]
    file = tmp_path / "inputs.safetensors"
    sample(model, *batches[:1], max_tokens=max_tokens).save(file)
    with record_inputs(model, samples=InputSamples.load(file)) as samples:
        for batch in batches[1:]:
            logits(model, batch)
    same(samples, sample(model, *batches, max_tokens=max_tokens), 0.0)


def test_routing_can_be_recorded_at_the_same_time() -> None:
    model, batch = fresh("qwen3_moe"), batch_of(2, 20)
    with record_routing(model) as statistics, record_inputs(model) as samples:
        logits(model, batch)
    for name, layer in samples.layers.items():
        counts = layer.expert_ids.flatten().bincount(minlength=8)
        assert torch.equal(counts, statistics.layers[name].counts)
    same(samples, sample(model, batch))


def test_repeats_by_gradient_checkpointing_are_not_sampled() -> None:
    model, batch = fresh("qwen3_moe").train(), batch_of(2, 9)
    model.activation_checkpointing_enable()
    with record_inputs(model) as samples:
        model(**batch, use_cache=False).logits.sum().backward()
    assert {layer.num_tokens for layer in samples.layers.values()} == {18}


def test_tokens_of_experts() -> None:
    layer = LayerSample(
        num_tokens=3,
        positions=torch.arange(3),
        inputs=torch.arange(6.0).view(3, 2),
        expert_ids=torch.tensor([[0, 2], [1, 3], [3, -1]]),
    )
    assert layer.routed_to(2).tolist() == [[0, 1]]
    assert layer.routed_to(3, 0).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert layer.routed_to(5).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_keeps_everything(dtype: torch.dtype, tmp_path) -> None:
    samples = sample(fresh("qwen3_moe").to(dtype), batch_of(2, 20), max_tokens=11)
    loaded = InputSamples.load(samples.save(tmp_path / "new" / "inputs.safetensors"))
    assert loaded.max_tokens == 11
    assert {layer.inputs.dtype for layer in loaded.layers.values()} == {dtype}
    same(loaded, samples, 0.0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["inputs.safetensors"]


FAULTS = {
    "ids": (lambda t: t.__setitem__("a.expert_ids", t["a.expert_ids"] - 3), "below -1"),
    "NaN": (lambda t: t["a.inputs"].__setitem__((1, 0), float("nan")), "inputs hold NaN or infinity"),
    "order": (
        lambda t: t.__setitem__("a.positions", t["a.positions"].flip(0)),
        "positions are not ascending",
    ),
    "range": (lambda t: t.__setitem__("a.positions", t["a.positions"] + 9), "positions are not ascending"),
    "dtype": (lambda t: t.__setitem__("a.inputs", t["a.inputs"].long()), "not int64, floats and int64"),
    "shape": (lambda t: t.__setitem__("a.inputs", t["a.inputs"][:2].clone()), r"not T=3 rows"),
    "missing": (lambda t: t.pop("a.inputs"), "layer 'a': inputs is missing"),
    "unknown": (lambda t: t.__setitem__("b.inputs", torch.ones(1)), "the unknown tensor 'b.inputs'"),
}


def small() -> InputSamples:
    layer = LayerSample(
        num_tokens=5,
        positions=torch.tensor([0, 2, 4]),
        inputs=torch.ones(3, 4),
        expert_ids=torch.tensor([[0], [1], [-1]]),
    )
    return InputSamples(max_tokens=3, layers={"a": layer})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused(fault: str, tmp_path) -> None:
    file = small().save(tmp_path / "inputs.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    change, message = FAULTS[fault]
    change(tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        InputSamples.load(file)
    assert "record them again" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "its format is 'x'"),
        ({"version": "2"}, "its version is '2'"),
        ({"samples": "{"}, "is not a whole file of input samples"),
        ({"samples": json.dumps({"max_tokens": 0, "layers": []})}, "max_tokens=0"),
        ({"samples": json.dumps({"max_tokens": 3, "layers": [1]})}, "lists no layers"),
        ({"samples": json.dumps({"max_tokens": 3, "layers": [{"name": "a"}]})}, "num_tokens=None"),
    ],
)
def test_a_foreign_header_is_refused(changes: dict[str, str], message: str, tmp_path) -> None:
    file = small().save(tmp_path / "inputs.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | changes
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=message):
        InputSamples.load(file)


def test_files_that_cannot_be(tmp_path) -> None:
    with pytest.raises(ValueError, match="there are no input samples at"):
        InputSamples.load(tmp_path / "inputs.safetensors")
    with pytest.raises(ValueError, match=r"written to a .safetensors file"):
        small().save(tmp_path / "inputs.bin")
    file = small().save(tmp_path / "inputs.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not a whole file of input samples"):
        InputSamples.load(file)


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        InputSamples(max_tokens=0)
