import json
from pathlib import Path

import pytest
from moekit.moe import expert_layers, save_checkpoint
from moekit.scripts import cli
from moekit.scripts.checkpoint_files import tensor_bytes
from moekit.scripts.inspect_model import run
from moekit.scripts.inspect_tables import joined_names
from moekit.scripts.options import InspectOptions

from .tiny_checkpoints import tiny_qwen


@pytest.mark.parametrize("load_weights", [True, False])
def test_counts_are_those_of_the_model(checkpoint, load_weights):
    facts = run(InspectOptions(model=str(checkpoint), load_weights=load_weights))
    model = tiny_qwen()
    assert facts["class"] == "Qwen3MoeForCausalLM"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["bytes"] == tensor_bytes(checkpoint)
    one_expert = 3 * 32 * 16
    assert facts["active_parameters"] == facts["parameters"] - 2 * 6 * one_expert
    assert [layer["experts"] for layer in facts["layers"]] == [8, 8]
    assert [entry["experts"] for entry in facts["savings"]] == [12, 8, 4]
    maps = 2 * 8 * 8
    assert facts["savings"][1]["bytes"] == facts["bytes"] - 2 * 4 * one_expert * 4 + maps
    router = facts["layers"][0]["router"]
    assert (router is not None and router["scoring"] == "softmax") == load_weights


def test_the_terminal_shows_it_within_100_columns(checkpoint, data, tmp_path, capsys):
    target = tmp_path / "facts.json"
    arguments = ["inspect", str(checkpoint), "--data", str(data), "--seq-len", "32", "--tokens", "640"]
    assert cli.main([*arguments, "--json", str(target), "--report", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    for text in (
        "model.layers.{0-1}.mlp",
        "softmax",
        "experts",
        "50% of the experts",
        "Routing of 640 tokens",
    ):
        assert text in shown
    table = shown.partition("MoE layers")[2].partition("pictures")[0]
    assert max(map(len, table.splitlines())) <= 100
    facts = json.loads(target.read_text(encoding="utf-8"))
    assert [row["tokens"] for row in facts["routing"]] == [640, 640]
    assert sum(facts["routing"][0]["usage"]) == pytest.approx(1)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"inspect.json", "load_heatmap.png", "layer_000.png", "layer_001.png"}


def test_a_merged_checkpoint_shows_both_counts(tmp_path, capsys):
    model = tiny_qwen()
    layer = expert_layers(model)[0]
    layer.replace_experts(layer.experts()[:3], [0, 1, 2, 0, 1, 2, 0, 1])
    save_checkpoint(model, tmp_path)
    facts = run(InspectOptions(model=str(tmp_path)))
    assert "3 (router: 8)" in capsys.readouterr().out
    assert [layer["physical_experts"] for layer in facts["layers"]] == [3, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x.txt", "load_weights": False}, "--data needs the weights"),
        ({"report": Path("r")}, "--report draws how experts are used"),
        ({"batch_size": 0}, "must be positive"),
        ({"data": "missing.txt"}, "does not exist"),
    ],
)
def test_options_that_cannot_be(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        run(InspectOptions(model=str(checkpoint), **options))


def test_names_of_like_layers_are_joined():
    assert joined_names(["model.layers.3.mlp"]) == "model.layers.3.mlp"
    assert joined_names([f"layers.{i}.mlp" for i in (0, 1, 2, 5)]) == "layers.{0-2,5}.mlp"
    assert joined_names(["a.0.b.0", "a.1.b.1"]) == "a.0.b.0 and 1 more"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "-1", "m"), "--seed -1 is not between 0 and"),
        (("--device", "toaster", "m"), "--device toaster cannot be used"),
        (("--data", "", "m"), "--data is empty"),
        (("",), "MODEL is empty"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_model_is_read(capsys, options, message):
    assert cli.main(["inspect", *options]) == 2
    assert message in capsys.readouterr().err
