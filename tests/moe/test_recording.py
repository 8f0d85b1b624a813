"""Recorded sums are those of a slow loop over tokens, whatever the batches, the padding and the kernels."""

# B batch, S sequence, T tokens, K active experts, E logical experts, D hidden width

import pytest
import torch
from moekit.moe import RoutingStatistics, expert_layers, record_routing
from moekit.moe.statistics_file import TENSORS
from torch import Tensor
from transformers import PreTrainedModel

from .families import tiny_inputs
from .samples import close, fresh, implement, logits, merged, replicated
from .test_conformance import reference_expert

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def record(model: PreTrainedModel, *batches: dict[str, Tensor]) -> RoutingStatistics:
    with record_routing(model) as statistics:
        for batch in batches:
            logits(model, batch)
    return statistics


def same(actual: RoutingStatistics, expected: RoutingStatistics, tolerance: float = 1e-5) -> None:
    assert list(actual.layers) == list(expected.layers)
    for name, mine in actual.layers.items():
        theirs = expected.layers[name]
        assert (mine.num_tokens, mine.top_k) == (theirs.num_tokens, theirs.top_k)
        for field, tensor in mine.tensors.items():
            if tensor.is_floating_point():
                close(tensor, getattr(theirs, field), tolerance)
            else:
                assert torch.equal(tensor, getattr(theirs, field)), field
        assert mine.router_entropy_sum == pytest.approx(theirs.router_entropy_sum, rel=tolerance)


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(ids_BS: Tensor, lengths: list[int], side: str, width: int) -> dict[str, Tensor]:
    """Those prefixes of the sequences, padded to `width` with varying tokens."""
    out, mask = (
        torch.randint(3, 64, (len(lengths), width)),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        out[row, place], mask[row, place] = ids_BS[row, :length], 1
    return {"input_ids": out, "attention_mask": mask}


def slow_statistics(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, dict]:
    """Every sum written out, one token and one choice at a time, in float64."""
    seen: dict[str, dict] = {layer.name: {} for layer in expert_layers(model)}
    handles = []
    for layer in expert_layers(model):
        own = seen[layer.name]
        handles += [
            layer.observe(lambda hidden, ids, weights, own=own: own.update(choices=(hidden, ids, weights)))
        ]
        handles += [layer.observe_logits(lambda rows, own=own: own.update(logits=rows))]
    for handle in handles:
        handle.__enter__()
    logits(model, inputs)
    for handle in handles:
        handle.__exit__(None, None, None)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten().tolist()
    return {layer.name: slow_layer(layer, seen[layer.name], mask) for layer in expert_layers(model)}


def slow_layer(layer, seen: dict, mask: list[int]) -> dict:
    hidden_TD, ids_TK, weights_TK = seen["choices"]
    hidden_TD = hidden_TD.flatten(0, -2)
    ids_TK, weights_TK = layer.as_choices(ids_TK, weights_TK)
    num_experts = layer.num_experts
    physical = layer.expert_map.tolist() if layer.expert_map is not None else list(range(num_experts))
    size = {"E": num_experts, "D": layer.hidden_size}
    sums = {
        name: torch.zeros([size[a] for a in axes.split()], dtype=torch.float64)
        for name, (_, axes) in TENSORS.items()
    }
    sums |= {"num_tokens": 0, "entropy": 0.0}
    for token, counts in enumerate(mask):
        if not counts:
            continue
        sums["num_tokens"] += 1
        row = seen["logits"][token].double()
        for a in range(num_experts):
            for b in range(num_experts):
                sums["logit_gram"][a, b] += row[a] * row[b]
        sums["entropy"] += sum(-float(p) * float(p.log()) for p in row.softmax(-1) if p > 0)
        chosen = [e for e in ids_TK[token].tolist() if e < num_experts]
        for a in chosen:
            for b in chosen:
                sums["coactivation"][a, b] += 1
        for choice, expert in enumerate(ids_TK[token].tolist()):
            if expert >= num_experts:
                continue
            weight = float(weights_TK[token, choice])
            out = reference_expert(layer, layer.experts()[physical[expert]], hidden_TD[token : token + 1])[
                0
            ].double()
            norm = float(out.square().sum().sqrt())
            sums["counts"][expert] += 1
            sums["routing_weight_sums"][expert] += weight
            sums["output_norm_sums"][expert] += norm
            sums["gated_output_norm_sums"][expert] += weight * norm
            sums["output_square_sums"][expert] += norm**2
            sums["output_sums"][expert] += out
            sums["max_output_norm"][expert] = max(float(sums["max_output_norm"][expert]), norm)
    return sums


@pytest.mark.parametrize(
    ("family", "state"),
    [
        ("qwen3_moe", fresh),
        ("gpt_oss", fresh),
        ("olmoe", fresh),
        ("nemotron_h", fresh),
        ("deepseek_v3", fresh),
        ("dbrx", fresh),
        ("jetmoe", fresh),
        ("longcat_flash", fresh),
        ("qwen3_moe", merged),
        ("jetmoe", merged),
        ("longcat_flash", merged),
    ],
)
def test_every_sum_is_the_slow_reference(family: str, state) -> None:
    model = state(family)
    inputs = tiny_inputs(model)
    statistics, expected = record(model, inputs), slow_statistics(model, inputs)
    for name, layer in statistics.layers.items():
        assert layer.num_tokens == expected[name]["num_tokens"] == 12
        assert layer.router_entropy_sum == pytest.approx(expected[name]["entropy"], rel=1e-5)
        for field, tensor in layer.tensors.items():
            close(tensor.double(), expected[name][field])
            assert tensor.abs().sum() > 0, field


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_implementations_agree(family: str, implementation: str) -> None:
    model = implement(fresh(family), implementation)
    same(record(model, tiny_inputs(model)), record(implement(fresh(family), "eager"), tiny_inputs(model)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [9, 14])
def test_padding_never_counts(side: str, width: int) -> None:
    model, lengths = fresh("qwen3_moe"), [9, 1, 4]
    ids_BS = ids_of(3, 9)
    alone = [record(model, {"input_ids": ids_BS[row : row + 1, :n]}) for row, n in enumerate(lengths)]
    batch = padded(ids_BS, lengths, side, width)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    same(record(model, batch | {"position_ids": positions}), alone[0] + alone[1] + alone[2])


def test_padding_alone_is_nothing() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    assert record(model, inputs | {"attention_mask": torch.zeros_like(inputs["input_ids"])}).layers == {}


def test_a_batch_split_changes_nothing() -> None:
    """In float64, so that nothing but the sums themselves could differ."""
    model = implement(fresh("qwen3_moe").double(), "eager")  # grouped_mm knows no float64
    batch = padded(ids_of(6, 9), [9, 2, 5, 7, 1, 8], "right", 9)
    rows = [{name: tensor[i : i + 2] for name, tensor in batch.items()} for i in (0, 2, 4)]
    whole = record(model, batch)
    same(record(model, *rows), whole, 1e-12)
    parts = [record(model, row) for row in rows]
    same(parts[0] + parts[1] + parts[2], whole, 1e-12)


def test_the_mask_may_come_by_position() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    with record_routing(model) as statistics, torch.no_grad():
        model(inputs["input_ids"], inputs["attention_mask"])
    same(statistics, record(model, inputs))


def test_the_mask_of_one_forward_is_forgotten_in_the_next() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    with record_routing(model) as statistics, torch.no_grad():
        model(**inputs)
        model.model(input_ids=inputs["input_ids"])
    assert {layer.num_tokens for layer in statistics.layers.values()} == {12 + 14}


def test_a_mask_that_does_not_say_what_is_padding_is_refused() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    square = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"needs the attention mask as \[batch, length\]"):
        record(model, {"input_ids": inputs["input_ids"], "attention_mask": square})
    close(logits(model, inputs), logits(fresh("qwen3_moe"), inputs))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_a_cache_counts_each_token_once(side: str) -> None:
    model = fresh("qwen3_moe")
    prompt = padded(ids_of(2, 6), [6, 3], "left", 6)
    if side == "right":
        prompt = padded(ids_of(2, 6), [6, 6], "right", 6)
    with record_routing(model) as decoding:
        tokens = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    again = {"input_ids": tokens[:, :-1], "attention_mask": mask, "position_ids": positions}
    same(decoding, record(model, again), 1e-4)


def encoder_and_decoder(statistics: RoutingStatistics) -> tuple[set[int], set[int]]:
    encoder = {s.num_tokens for name, s in statistics.layers.items() if name.startswith("encoder")}
    return encoder, {s.num_tokens for name, s in statistics.layers.items() if name.startswith("decoder")}


def test_encoder_and_decoder_have_their_own_masks() -> None:
    model = fresh("switch_transformers")
    inputs = tiny_inputs(model)  # 2 sequences of 7, with 2 of padding; 5 in the decoder
    assert encoder_and_decoder(record(model, inputs)) == ({12}, {10})
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert encoder_and_decoder(record(model, inputs | {"decoder_attention_mask": mask})) == ({12}, {7})
    longer = {"input_ids": inputs["decoder_input_ids"], "decoder_input_ids": inputs["input_ids"]}
    longer["attention_mask"] = mask
    assert encoder_and_decoder(record(model, longer)) == ({7}, {14})


def test_labels_make_the_decoders_input_and_every_position_counts() -> None:
    model = fresh("switch_transformers")
    inputs = tiny_inputs(model)
    model.config.decoder_start_token_id = 0
    labels = inputs["input_ids"][:, :6].contiguous()
    del inputs["decoder_input_ids"]
    assert encoder_and_decoder(record(model, inputs | {"labels": labels})) == ({12}, {12})


def test_generation_behind_an_encoder_honours_its_mask() -> None:
    model = fresh("switch_transformers")
    inputs = tiny_inputs(model)
    del inputs["decoder_input_ids"]
    with record_routing(model) as statistics:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert encoder_and_decoder(statistics) == ({12}, {8})


@pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers", "llama4", "dbrx", "gpt_oss"])
def test_merged_models_are_recorded_by_logical_expert(family: str) -> None:
    inputs = tiny_inputs(fresh(family))
    one, many = merged(family, 3), replicated(family, 3)
    expected = record(many, inputs)
    same(record(one, inputs), expected)
    assert {s.num_experts for s in expected.layers.values()} == {8}


def test_a_layer_of_groups_is_recorded_by_group() -> None:
    model = merged("qwen3_moe", 4, router="logsumexp")
    statistics = record(model, tiny_inputs(model))
    for layer in statistics.layers.values():
        assert layer.num_experts == 4
        assert int(layer.counts.sum()) == layer.num_tokens * 2 == 24


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch_transformers", "jetmoe", "llama4"])
def test_the_model_computes_the_same_and_is_left_as_it_was(family: str) -> None:
    model = fresh(family)
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    with record_routing(model):
        close(logits(model, inputs), expected)
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(logits(model, inputs), expected)


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    with pytest.raises(IndexError), record_routing(model):
        logits(model, {"input_ids": torch.tensor([[999]])})
    assert torch.equal(logits(model, inputs), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_fails_leaves_no_trace_in_the_sums() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    with record_routing(model) as statistics:
        with pytest.raises(IndexError):
            logits(model, {"input_ids": torch.tensor([[999]])})
        logits(model, inputs)
    same(statistics, record(model, inputs))


def test_gradients_and_training_are_those_of_the_bare_model() -> None:
    bare, recorded = fresh("qwen3_moe").train(), fresh("qwen3_moe").train()
    inputs = tiny_inputs(bare) | {"labels": tiny_inputs(bare)["input_ids"]}
    bare(**inputs).loss.backward()
    with record_routing(recorded) as statistics:
        recorded(**inputs).loss.backward()
    for (_name, mine), theirs in zip(recorded.named_parameters(), bare.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    assert not any(t.requires_grad for s in statistics.layers.values() for t in s.tensors.values())


def test_gradient_checkpointing_counts_once() -> None:
    model = fresh("qwen3_moe").train()
    model.activation_checkpointing_enable()
    inputs = tiny_inputs(model)
    with record_routing(model) as statistics:
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert {layer.num_tokens for layer in statistics.layers.values()} == {12}


def test_autocast_does_not_round_the_sums() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    layer = expert_layers(model)[0]
    rows: list[Tensor] = []
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with record_routing(model) as statistics, layer.observe_logits(rows.append), autocast, torch.no_grad():
        model(**inputs)
    kept = rows[0][inputs["attention_mask"].flatten().bool()].double()
    close(statistics.layers[layer.name].logit_gram, kept.T @ kept, 1e-6)


def test_bfloat16_models_are_summed_in_float() -> None:
    model = fresh("qwen3_moe").bfloat16()
    inputs = tiny_inputs(model)
    statistics, expected = record(model, inputs), slow_statistics(model, inputs)
    for name, layer in statistics.layers.items():
        for field, tensor in layer.tensors.items():
            close(tensor.double(), expected[name][field], 2e-2)
        assert torch.equal(layer.counts.double(), expected[name]["counts"])


def test_nothing_per_token_is_kept() -> None:
    model = fresh("qwen3_moe")
    small = record(model, {"input_ids": ids_of(1, 3)})
    large = record(model, *[{"input_ids": ids_of(4, 50)}] * 3)
    for name, layer in large.layers.items():
        assert (layer.num_tokens, small.layers[name].num_tokens) == (600, 3)
        shapes = {field: tuple(t.shape) for field, t in layer.tensors.items()}
        assert shapes == {field: tuple(t.shape) for field, t in small.layers[name].tensors.items()}
        assert {n for n, v in vars(layer).items() if isinstance(v, Tensor)} == set(shapes)
        assert sum(t.numel() for t in layer.tensors.values()) == 6 * 8 + 2 * 8 * 8 + 8 * 32


def test_recording_twice_at_once_is_refused_and_the_first_goes_on() -> None:
    model = fresh("qwen3_moe")
    inputs = tiny_inputs(model)
    with record_routing(model) as statistics:
        with pytest.raises(ValueError, match="is being recorded already"), record_routing(model):
            pass
        logits(model, inputs)
    same(statistics, record(model, inputs))


def test_only_the_layers_asked_for_are_recorded() -> None:
    model = fresh("qwen3_moe")
    wanted = expert_layers(model)[-1:]
    with record_routing(model, wanted) as statistics:
        logits(model, tiny_inputs(model))
    assert list(statistics.layers) == [wanted[0].name]
