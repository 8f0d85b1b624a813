"""Planning layer by layer, and what a layer suffers alone."""

import json

import pytest
import torch
from moekit.compress import METHODS, CompressionPlan, apply_plan
from moekit.moe import expert_layers
from moekit.moe.data import TokenBlocks
from moekit.moe.statistics import RoutingStatistics
from moekit.scripts import cli, layer_reading
from moekit.scripts.calibrate import record
from moekit.scripts.compress_presets import with_preset
from moekit.scripts.options import CompressOptions
from moekit.scripts.sensitivity import layer_sensitivities
from moekit.scripts.sequential import compress_in_sequence
from safetensors.torch import load_file

from ..moe.families import FAMILIES
from ..moe.samples import fresh
from .tiny_checkpoints import TEXT_OPTIONS

UNSUPPORTED = {"diffusion_gemma", "ernie4_5_vl_moe", "switch_transformers"}
PLAIN = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe")
"""Families whose layers give hidden states and nothing else."""


def blocks_for(model, count=6, length=16):
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return TokenBlocks(ids, mask, ("x",) * count)


def in_sequence(model, method, experts, *, sample=False, **options):
    layers = expert_layers(model)

    def plan_layers(part, known, samples):
        given = {"samples": samples} if sample else {}
        return METHODS[method](part, known, experts=experts, **options, **given)

    blocks = blocks_for(model)
    return compress_in_sequence(
        model, layers, blocks, plan_layers, batch_size=2, sample_inputs=sample, progress=False
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_sequential_plan_carried_out_on_the_original_gives_the_same_model(family):
    model = fresh(family)
    plan, statistics, report = in_sequence(model, "reap", 4)
    assert plan.settings["sequential"]
    assert set(report) == set(statistics.layers) == {layer.name for layer in plan.layers}
    again = fresh(family)
    apply_plan(again, CompressionPlan.from_json(plan.to_json()))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - UNSUPPORTED))
def test_layers_read_behind_each_other_or_from_the_start(family, monkeypatch):
    model = fresh(family)
    first = {
        "input_ids": blocks_for(model).input_ids[:1],
        "attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
    if family in PLAIN:
        assert isinstance(layer_reading.layer_reader(model, [first]), layer_reading._FromLayerBefore)
    fast, slow = fresh(family), fresh(family)
    found = in_sequence(fast, "m-smoe", 2, grouping="uniform")
    monkeypatch.setattr(layer_reading.LayerWalk, "is_faithful", lambda *_: False)
    wanted = in_sequence(slow, "m-smoe", 2, grouping="uniform")
    assert found[0].to_json() == wanted[0].to_json()
    for name, layer in wanted[1].layers.items():
        assert torch.equal(layer.counts, found[1].layers[name].counts)
        torch.testing.assert_close(layer.logit_gram, found[1].layers[name].logit_gram)
    for name, tensor in slow.state_dict().items():
        assert torch.equal(tensor, fast.state_dict()[name]), name


def test_the_first_layer_sees_the_original_and_later_ones_what_was_cut():
    model = fresh("qwen3_moe")
    blocks = blocks_for(model)
    whole = record(model, expert_layers(model), blocks, 2)
    _, statistics, _ = in_sequence(model, "reap", 2)
    names = list(whole.layers)
    assert torch.equal(statistics.layers[names[0]].counts, whole.layers[names[0]].counts)
    assert not torch.equal(statistics.layers[names[2]].logit_gram, whole.layers[names[2]].logit_gram)


def test_all_experts_kept_is_the_plan_that_is_not_sequential():
    model = fresh("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan, _, _ = in_sequence(model, "ream", 8, sample=True)
    assert all(layer.is_identity for layer in plan.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sensitivities_are_those_of_single_cuts_and_leave_the_model(tmp_path):
    model = fresh("qwen3_moe")
    layers, blocks = expert_layers(model), blocks_for(model)
    table = record(model, layers, blocks, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def planner(part, kept):
        known = RoutingStatistics(layers={layer.name: table.layers[layer.name] for layer in part})
        return METHODS["reap"](part, known, experts=kept)

    counts = [(2, 4), (2, 8), (2,)]
    found = layer_sensitivities(model, layers, blocks, counts, planner, batch_size=2)
    calls = []

    def failing(part, kept):
        calls.append(kept)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return planner(part, kept)

    kept = tmp_path / "losses.json"
    with pytest.raises(KeyboardInterrupt):
        layer_sensitivities(model, layers, blocks, counts, failing, batch_size=2, keep=kept)
    assert found == layer_sensitivities(model, layers, blocks, counts, failing, batch_size=2, keep=kept)
    assert calls == [2, 4, 2, 2, 8, 2]  # the interrupted one again, and none before
    assert [tuple(losses) for losses in found] == counts
    assert found[1][8] == 0
    assert found[0][4] < found[0][2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mask = blocks.attention_mask.bool()
    with torch.no_grad():
        base = model(input_ids=blocks.input_ids, attention_mask=blocks.attention_mask).logits[mask]
    for number, layer in enumerate(layers):
        cut = fresh("qwen3_moe")
        others = [other for other in range(3) if other != number]
        plan = METHODS["reap"](expert_layers(cut), table, experts=2, exclude_layers=others)
        apply_plan(cut, plan)
        with torch.no_grad():
            after = cut(input_ids=blocks.input_ids, attention_mask=blocks.attention_mask).logits[mask]
        kl = (base.softmax(-1) * (base.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
        assert found[number][2] == pytest.approx(float(kl), rel=1e-3), layer.name
    assert min(losses[2] for losses in found) > 0


def run(checkpoint, data, out, *words):
    given = ["--data", str(data)] if data else []
    return cli.main(
        ["compress", str(checkpoint), *given, *TEXT_OPTIONS, "--no-report", "--out", str(out), *words]
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "ream", "--experts", "4"),
        ("--method", "hc-smoe", "--experts", "4"),
        ("--method", "hc-smoe", "--experts", "4", "--form", "stock"),
        ("--method", "reap", "--experts", "4", "--sequential", "on", "--form", "stock"),
        ("--method", "reap", "--experts", "4", "--grouping", "sensitivity"),
        ("--method", "hc-smoe", "--experts", "4", "--grouping", "sensitivity"),
        ("--method", "man", "--layer-experts", "8", "4"),
        ("--method", "reap", "--experts", "4", "--preset", "best"),
    ],
    ids=" ".join,
)
def test_commands(checkpoint, data, tmp_path, words):
    assert run(checkpoint, data, tmp_path / "out", *words) == 0
    plan = CompressionPlan.load(tmp_path / "out" / "plan.json")
    assert plan.method == words[1]
    # Its own plan gives the same weights again.
    if "ream" in words or "best" in words:
        return  # samples come through layers that are merged already; weights are healed
    assert run(checkpoint, data, tmp_path / "again", "--plan", str(tmp_path / "out" / "plan.json")) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plan_of_a_method_that_reads_no_data_needs_none(checkpoint, tmp_path):
    out = tmp_path / "plan.json"
    words = ["compress", str(checkpoint), "--method", "aimer", "--experts", "4", "--plan-only"]
    assert cli.main([*words, "--out", str(out)]) == 0
    assert all(layer.num_kept == 4 for layer in CompressionPlan.load(out).layers)


def test_a_method_that_reads_no_data_needs_none(checkpoint, tmp_path, capsys):
    assert run(checkpoint, None, tmp_path / "out", "--method", "aimer", "--experts", "4") == 0
    assert run(checkpoint, None, tmp_path / "other", "--method", "reap", "--experts", "4") == 2
    assert "--data is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--method", "ream", "--experts", "4", "--grouping", "adaptive"),
            "plan a layer before the next is known",
        ),
        (("--method", "ream", "--layer-experts", "4", "4"), "plan a layer before the next is known"),
        (("--experts", "4", "--layer-experts", "4", "4"), "give one of --experts, --ratio, --layer-experts"),
        (("--method", "reap", "--experts", "4", "--similarity", "outputs"), "--similarity does not apply"),
        (
            ("--method", "reap", "--layer-experts", "4", "4", "--grouping", "sensitivity"),
            "--grouping sensitivity would find out; give either",
        ),
        (
            ("--method", "reap", "--experts", "4", "--grouping", "sensitivity", "--form", "stock"),
            "which --grouping sensitivity does not give",
        ),
    ],
)
def test_what_cannot_be(checkpoint, data, tmp_path, capsys, words, message):
    assert run(checkpoint, data, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_best_preset_leaves_what_is_said(checkpoint, data, tmp_path):
    assert run(checkpoint, data, tmp_path / "out", "--preset", "best", "--experts", "4") == 0
    plan = CompressionPlan.load(tmp_path / "out" / "plan.json")
    assert (plan.method, plan.settings["grouping"]) == ("ean", "sensitivity")
    run_file = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert run_file["healing"]["mode"] == "router"
    assert with_preset(CompressOptions(model="m", preset="best", plan_only=True)).heal == "none"
    kd = with_preset(CompressOptions(model="m", preset="best", heal="kd"))
    assert (kd.heal, kd.heal_learning_rate) == ("kd", None)
    said = CompressOptions(model="m", preset="best", grouping="uniform")
    assert (with_preset(said).method, with_preset(said).grouping) == ("ean", "uniform")
    usual = CompressOptions(model="m", preset="best", method="m-smoe", heal="none")
    assert (with_preset(usual).method, with_preset(usual).heal) == ("m-smoe", "none")
    assert with_preset(usual).heal_learning_rate is None
    plain = with_preset(CompressOptions(model="m"))
    assert (plain.method, plain.grouping, plain.heal) == ("m-smoe", "auto", "none")
