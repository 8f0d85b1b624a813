"""Which experts are protected, and by what."""

import copy

import pytest
import torch
from moekit.compress import METHODS, super_experts
from moekit.moe import expert_layers, load_documents, token_blocks
from moekit.moe.data import TokenBlocks
from moekit.moe.statistics import LayerStatistics, RoutingStatistics
from moekit.scripts.calibrate import record
from moekit.scripts.prepare import SAMPLE_FILE, bundled_folder
from moekit.scripts.sequential import compress_in_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..moe.samples import fresh
from .plan_samples import layers_of, statistics


def table(*layers: list[float]) -> RoutingStatistics:
    """Statistics with these largest norms."""
    made = RoutingStatistics()
    for index, norms in enumerate(layers):
        known = LayerStatistics.zeros(len(norms), 4, 2)
        known.max_output_norm.copy_(torch.tensor(norms, dtype=torch.float64))
        made.layers[str(index)] = known
    return made


def test_the_outlier_of_a_layer_is_found():
    assert super_experts(table([1.0, 2.0, 3.0, 21.0], [1.0, 1.0, 1.0, 1.0])) == {"0": [3]}


def test_a_largest_output_that_is_no_outlier_is_not():
    assert super_experts(table([1.0, 2.0, 3.0, 20.0], [1.0, 1.0, 1.0, 1.0])) == {}


def test_each_layer_is_judged_by_itself():
    """So that the answer is the same where layers are read one at a time."""
    layers = [1.0, 1.0, 1.0, 50.0], [400.0, 300.0, 400.0, 510.0], [2.0, 90.0, 3.0, 2.0]
    assert super_experts(table(*layers)) == {"0": [3], "2": [1]}
    assert super_experts(table(layers[2])) == {"0": [1]}


def test_beside_a_much_larger_one_it_is_not():
    norms = [1.0] * 14 + [20.0, 300.0]
    assert super_experts(table(norms)) == {"0": [15]}


def test_experts_that_no_token_chose_do_not_make_others_outliers():
    assert super_experts(table([0.0, 0.0, 0.0, 0.0, 5.0, 6.0])) == {}


def test_nothing_is_found_of_nothing():
    assert super_experts(RoutingStatistics()) == {}
    assert super_experts(table([0.0, 0.0, 0.0])) == {}


def test_two_of_many_experts():
    norms = [1.0 + i / 1000 for i in range(256)]
    norms[7], norms[200] = 300.0, 400.0
    assert super_experts(table(norms, [1.0] * 256)) == {"0": [7, 200]}


def outlier(family: str, layer: int, expert: int) -> RoutingStatistics:
    """The family's statistics, with one expert whose outputs dwarf all others and that is hardly used."""
    changed = copy.deepcopy(statistics(family))
    known = changed.layers[layers_of(family)[layer].name]
    known.max_output_norm[expert] = 1e6
    known.counts[expert] = 1
    known.gated_output_norm_sums[expert] = 0
    return changed


@pytest.mark.parametrize("name", ["reap", "frequency", "m-smoe"])
def test_super_experts_stay_alone(name):
    layers, table = layers_of("qwen3_moe"), outlier("qwen3_moe", 1, 4)
    assert super_experts(table) == {layers[1].name: [4]}
    plan = METHODS[name](layers, table, experts=3, grouping="uniform")
    assert [g.experts for g in plan.layers[1].groups if 4 in g.experts] == [(4,)]
    assert plan.settings["protected"] == [f"{layers[1].name} expert 4"]
    free = METHODS[name](layers, table, experts=3, grouping="uniform", protect=False)
    assert [g.experts for g in free.layers[1].groups if 4 in g.experts] != [(4,)]
    assert free.settings["protected"] == []


def test_a_group_limited_router_keeps_them_in_their_group():
    layers = layers_of("deepseek_v3")
    table = outlier("deepseek_v3", 0, 1)
    plan = METHODS["reap"](layers, table, experts=layers[0].num_experts // 2)
    assert 1 in plan.layers[0].cores


def test_more_super_experts_than_are_kept(monkeypatch):
    layers = layers_of("qwen3_moe")
    name = layers[1].name
    monkeypatch.setattr("moekit.compress.prune.super_experts", lambda known: {name: [1, 4, 6]})
    kept = METHODS["reap"](layers, statistics("qwen3_moe"), experts=3).layers[1].cores
    assert kept == [1, 4, 6]
    with pytest.raises(ValueError, match=r"2 experts of layer .* leave no room for the super experts \["):
        METHODS["reap"](layers, statistics("qwen3_moe"), experts=2)


@pytest.mark.parametrize("protect", [True, False])
def test_they_are_protected_where_layers_are_planned_one_at_a_time(protect):
    """An expert of huge outputs that chance would drop."""
    model = fresh("qwen3_moe")
    layers = expert_layers(model)
    ids = torch.arange(96).reshape(6, 16) % model.config.vocab_size
    blocks = TokenBlocks(ids, torch.ones_like(ids), ("x",) * 6)
    with torch.no_grad():
        dict(layers[1].experts()[5].named_tensors())["down"].mul_(1000)
    known = record(model, layers, blocks, 2)
    assert known.layers[layers[1].name].counts[5] > 0
    unlucky = next(
        seed
        for seed in range(100)
        if 5 not in METHODS["random"](layers, None, experts=2, seed=seed).layers[1].cores
    )

    def plan_layers(part, known, samples):
        return METHODS["random"](part, known, experts=2, seed=unlucky, protect=protect)

    plan, _, _ = compress_in_sequence(
        model, layers, blocks, plan_layers, batch_size=2, sample_inputs=False, progress=False
    )
    assert (5 in plan.layers[1].cores) == protect
    assert all(len(layer.cores) == 2 for layer in plan.layers)


@pytest.mark.slow
def test_the_bundled_model_has_none():
    """Its largest outputs are 8 times the median of their layer, and that expert can be spared."""
    folder = bundled_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = token_blocks(
        load_documents(str(folder / SAMPLE_FILE)), tokenizer, seq_len=256, max_tokens=32768, seed=0
    )
    assert super_experts(record(model, expert_layers(model), blocks, 8)) == {}
