import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from moekit.compress.alignment import permute_expert
from moekit.compress.layer_plan import ExpertGroup, LayerPlan
from moekit.compress.plan import AlignmentRule, CompressionPlan, ModelIdentity
from moekit.moe import expert_layers
from moekit.scripts import cli, staging
from moekit.scripts.checkpoint_files import tensor_bytes
from moekit.scripts.compress import carry_over
from moekit.scripts.compress_presets import with_preset
from moekit.scripts.load import load_model
from moekit.scripts.options import CompressOptions
from moekit.scripts.prepare import planner_options
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from .tiny_checkpoints import (
    TEXT_OPTIONS,
    VOCABULARY,
    tiny_qwen,
    tiny_switch,
    tiny_tokenizer,
    write_checkpoint,
)


def compress(model: Path, data: Path, *more: object) -> int:
    return cli.main(["compress", str(model), "--data", str(data), *TEXT_OPTIONS, *map(str, more)])


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a full run with report, kept for all tests that look at one."""
    out = tmp_path_factory.mktemp("whole") / "small"
    assert compress(checkpoint, data, "--ratio", 0.5, "--out", out) == 0
    return out


def test_a_full_run_leaves_everything_and_nothing_else(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "README.md",
        "calibration",
        "config.json",
        "figures",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
        "report.html",
        "report.json",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in whole.parent.iterdir()] == ["small"]


def test_no_tensors_but_weights_lie_beside_the_config(whole):
    """VLLM reads all safetensors files of a folder without an index."""
    assert [path.name for path in whole.glob("*.safetensors")] == ["model.safetensors"]


def test_the_result_is_smaller_by_what_was_foretold(whole, checkpoint):
    run = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    sizes = run["metrics"]["tensor_bytes"]
    assert sizes["predicted"] == sizes["written"] == tensor_bytes(whole) < tensor_bytes(checkpoint)
    assert run["metrics"]["experts"] == {"before": 16, "after": 8}
    assert run["plan"]["hash"] == CompressionPlan.load(whole / "plan.json").hash
    assert sum(layer.num_physical_experts for layer in expert_layers(load_model(str(whole)))) == 8


def test_the_record_holds_what_was_measured(whole):
    run = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    metrics = run["metrics"]
    assert metrics["fidelity"]["overall"]["kl"]["value"] > 0
    assert {row["domain"] for row in metrics["fidelity"]["domains"]} == {"salad", "sums"}
    names = {row["name"] for row in metrics["generation"]}
    assert names == {"Completions that end in a loop", "Questions answered correctly"}
    assert all(row["before"] > 0 and row["after"] > 0 for row in metrics["throughput"])
    assert run["command"].startswith("moekit compress ")
    assert run["versions"]["torch"] == torch.__version__
    assert metrics["reload_logit_difference"] <= 1e-5


def test_the_model_card_says_how_to_load_it(whole):
    card = (whole / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/or/hub-id", str(whole))
    assert "import moekit.moe" in code
    found: dict[str, object] = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "Qwen3MoeForCausalLM"
    assert "16 to 8 experts" in card


def test_the_tokenizer_is_that_of_the_original(whole, checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (whole / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_terminal_shows_the_difference(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert compress(checkpoint, data, "--experts", 4, "--no-report", "--out", out) == 0
    shown = capsys.readouterr()
    assert "experts in all layers" in shown.out
    assert str(out) in shown.out
    assert "report" not in shown.out
    assert not (out / "report.html").exists()


def test_keeping_all_experts_changes_nothing(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    assert compress(checkpoint, data, "--ratio", 1.0, "--no-report", "--out", out) == 0
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_stock_form_loads_where_moekit_was_never_imported(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    assert compress(checkpoint, data, "--experts", 4, "--form", "stock", "--no-report", "--out", out) == 0
    plan = CompressionPlan.load(out / "plan.json")
    assert (plan.form, plan.router, plan.settings["grouping"]) == ("stock", "slice", "uniform")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert not any(name.startswith('moekit') for name in sys.modules)\n"
        "with torch.no_grad():\n"
        "    print(float(model(torch.arange(9)[None]).logits.double().sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, check=True)
    with torch.no_grad():
        here = float(AutoModelForCausalLM.from_pretrained(out)(torch.arange(9)[None]).logits.double().sum())
    assert float(done.stdout) == pytest.approx(here, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "frequency"),
        ("--router", "logsumexp"),
        ("--alignment", "activations"),
        ("--router", "mean", "--similarity", "weights", "--grouping", "uniform"),
        ("--form", "stock", "--router", "mean", "--similarity", "outputs", "--weighting", "equal"),
        ("--grouping", "random", "--alignment", "none", "--reference", "first", "--exclude-layers", "1"),
    ],
)
def test_each_way_of_compression_gives_the_foretold_bytes(checkpoint, data, tmp_path, options):
    out = tmp_path / "out"
    assert compress(checkpoint, data, "--experts", 4, "--no-report", "--out", out, *options) == 0
    sizes = json.loads((out / "run.json").read_text(encoding="utf-8"))["metrics"]["tensor_bytes"]
    assert sizes["predicted"] == sizes["written"]


def test_sizes_are_those_of_the_files(data, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "half", tiny_qwen().to(torch.bfloat16))
    out = tmp_path / "out"
    assert compress(model, data, "--experts", 6, "--dtype", "float32", "--out", out) == 0
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    sizes = run["metrics"]["tensor_bytes"]
    assert sizes["source"] == tensor_bytes(model) < sizes["written"] == tensor_bytes(out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["num_bytes"] == [sizes["source"], sizes["written"]]
    assert "shared experts" not in report["bytes_by_part"]
    assert all(any(pair) for pair in report["bytes_by_part"].values())
    larger, types, parts = run["warnings"][-3:]
    assert larger.startswith("the result is larger than the original")
    assert "original is bfloat16 and the result float32" in types
    assert "do not add up" in parts
    assert "not smaller" in (out / "README.md").read_text(encoding="utf-8")
    assert "larger than the original" in " ".join(capsys.readouterr().err.split())


def test_an_ordinary_result_has_no_warning_about_its_size(whole):
    warnings = json.loads((whole / "run.json").read_text(encoding="utf-8"))["warnings"]
    assert not [text for text in warnings if "original" in text]


def test_sequence_to_sequence_model_in_bfloat16(data, tmp_path):
    model = write_checkpoint(tmp_path / "switch", tiny_switch())
    out = tmp_path / "out"
    assert compress(model, data, "--experts", 4, "--dtype", "bfloat16", "--no-report", "--out", out) == 0
    assert load_model(str(out)).dtype == torch.bfloat16


def test_plan_only_then_edited_then_carried_out(checkpoint, data, tmp_path, capsys):
    path, out = tmp_path / "plan.json", tmp_path / "out"
    assert compress(checkpoint, data, "--experts", 4, "--plan-only", "--out", path) == 0
    assert "16 -> 8 experts" in capsys.readouterr().out
    edited = json.loads(path.read_text(encoding="utf-8"))
    for layer in edited["layers"]:
        layer["groups"] = [
            {"experts": [e, e + 1], "weights": [0.25, 0.75], "core": e, "reference": e}
            for e in range(0, 8, 2)
        ]
    path.write_text(json.dumps(edited), encoding="utf-8")
    assert compress(checkpoint, data, "--plan", path, "--no-report", "--out", out) == 0
    assert [list(layer.group_of) for layer in CompressionPlan.load(out / "plan.json").layers] == [
        [0, 0, 1, 1, 2, 2, 3, 3]
    ] * 2
    edited["layers"][0]["groups"][0]["experts"] = [0, 2]
    path.write_text(json.dumps(edited), encoding="utf-8")
    assert compress(checkpoint, data, "--plan", path, "--out", tmp_path / "other") == 2
    assert "expert 2 is in groups 0 and 1 (layer 'model.layers.0.mlp')" in capsys.readouterr().err


def test_activation_matching_undoes_a_shuffle_of_neurons(data, tmp_path):
    model = tiny_qwen()
    layers = expert_layers(model)
    for experts in (layer.experts() for layer in layers):
        for e in range(0, 8, 2):
            experts[e + 1].copy_(permute_expert(experts[e], torch.randperm(16)))
    pairs = [ExpertGroup(experts=(e, e + 1), weights=(0.5, 0.5), core=e, reference=e) for e in range(0, 8, 2)]
    plan = CompressionPlan(
        model=ModelIdentity.of(layers),
        method="by hand",
        form="moekit",
        router="redirect",
        alignment=AlignmentRule(method="activations"),
        layers=tuple(LayerPlan(name=n.name, num_experts=8, top_k=2, groups=tuple(pairs)) for n in layers),
        requested_experts=8,
    )
    path, out = plan.save(tmp_path / "plan.json"), tmp_path / "out"
    checkpoint = write_checkpoint(tmp_path / "paired", model)
    assert compress(checkpoint, data, "--plan", path, "--no-report", "--out", out) == 0
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected, actual = model(ids).logits, load_model(str(out))(ids).logits
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert sum(layer.num_physical_experts for layer in expert_layers(load_model(str(out)))) == 8


def test_a_plan_is_overwritten_and_nothing_else(checkpoint, data, tmp_path, capsys):
    path, folder = tmp_path / "plan.json", tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    for experts in (4, 6):
        assert compress(checkpoint, data, "--experts", experts, "--plan-only", "--out", path) == 0
    assert CompressionPlan.load(path).actual_experts == 12
    assert compress(checkpoint, data, "--experts", 4, "--plan-only", "--out", folder) == 0
    assert CompressionPlan.load(folder / "plan.json").actual_experts == 8
    capsys.readouterr()
    assert compress(checkpoint, data, "--experts", 6, "--plan-only", "--out", folder) == 2
    assert "plan.json' exists" in capsys.readouterr().err
    assert CompressionPlan.load(folder / "plan.json").actual_experts == 8
    for text in ('{"format": "other"}', "thesis"):
        path.write_text(text, encoding="utf-8")
        assert compress(checkpoint, data, "--experts", 4, "--plan-only", "--out", path) == 2
        assert "is not a plan of moekit" in capsys.readouterr().err
        assert path.read_text(encoding="utf-8") == text
    assert compress(checkpoint, data, "--experts", 4, "--plan-only", "--out", folder / "notes.txt") == 2
    assert "is a file" in capsys.readouterr().err


def test_plan_only_without_out_prints_the_plan(checkpoint, data, capsys):
    assert compress(checkpoint, data, "--experts", 4, "--plan-only") == 0
    shown = capsys.readouterr().out
    plan = CompressionPlan.from_json(shown[shown.index("{") :])
    assert plan.actual_experts == 8


def refused(capsys, model: Path | str, data: Path | str, out: Path, *more: object) -> str:
    """The one line that a refused run prints."""
    assert (
        cli.main(["compress", str(model), "--data", str(data), "--experts", "4", "--out", str(out), *more])
        == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("moekit: error: ")
    return line


def test_models_that_cannot_be(whole, checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert "does not exist" in refused(capsys, "/no/such/model", data, out)
    assert "MODEL is empty" in refused(capsys, "", data, out)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    dense = write_checkpoint(tmp_path / "dense", LlamaForCausalLM(config))
    assert "LlamaForCausalLM has no routed experts" in refused(capsys, dense, data, out)
    assert "merged or replaced already" in refused(capsys, whole, data, out)
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    assert "'model.norm.weight' of" in refused(capsys, broken, data, out, *TEXT_OPTIONS)
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "is truncated" in refused(capsys, broken, data, out)
    weights.rename(broken / "pytorch_model.bin")
    assert "pickle" in refused(capsys, broken, data, out)
    assert not out.exists()


def test_data_that_cannot_be(checkpoint, tmp_path, capsys):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    assert "does not exist" in refused(capsys, checkpoint, tmp_path / "missing.txt", out)
    text.write_text("", encoding="utf-8")
    assert "holds no text" in refused(capsys, checkpoint, text, out)
    text.write_text("too short", encoding="utf-8")
    assert "less than one sequence of seq_len=128" in refused(capsys, checkpoint, text, out)
    assert cli.main(["compress", str(checkpoint), "--experts", "4", "--out", str(out)]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert not out.exists()


def test_a_tokenizer_of_another_model(data, tmp_path, capsys):
    larger = write_checkpoint(tmp_path / "larger", tiny_qwen(vocab_size=len(tiny_tokenizer()) * 3))
    assert "belongs to another model" in refused(capsys, larger, data, tmp_path / "out")


def test_text_that_the_vocabulary_does_not_hold(checkpoint, tmp_path, capsys):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"unused{i}" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens(["outside"])
    tokenizer.save_pretrained(model)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("inside outside " * 800, encoding="utf-8")
    line = refused(capsys, model, text, out, *TEXT_OPTIONS)
    assert "token id 300, but the model's vocabulary has 300 tokens, 0 to 299" in line
    assert cli.main(["inspect", str(model), "--data", str(text), "--seq-len", "32"]) == 2
    assert "token id 300" in capsys.readouterr().err
    assert not out.exists()


def test_files_of_a_tokenizer_are_carried_over(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    names = {"tekken.json", "qwen.tiktoken", "tokenizer.model", "vocab.json"}
    for name in (*names, "config.json"):
        (source / name).write_text(name, encoding="utf-8")
    carry_over(source, out)
    assert {path.name for path in out.iterdir()} == names


def test_an_output_that_is_not_empty(checkpoint, data, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "exists and is not empty" in refused(capsys, checkpoint, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_disk_without_room(checkpoint, data, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    line = refused(capsys, checkpoint, data, tmp_path / "out", *TEXT_OPTIONS)
    assert "bytes are needed there and 5,000 are free" in line
    assert not (tmp_path / "out").exists()


def test_what_the_user_leaves_open_follows_the_form():
    open_options = with_preset(CompressOptions(model="m", ratio=0.5))
    assert "router" not in planner_options(open_options)
    stock = with_preset(CompressOptions(model="m", ratio=0.5, form="stock", similarity="outputs"))
    chosen = {key: planner_options(stock)[key] for key in ("router", "grouping", "similarity")}
    assert chosen == {"router": "slice", "grouping": "uniform", "similarity": "outputs"}
    assert "score" not in planner_options(CompressOptions(model="m", ratio=0.5, method="frequency"))


def kill_when(arguments: list[str], out: Path, pattern: str) -> None:
    """Start the command and kill it as soon as its hidden folder holds such a file."""
    code = "import sys; from moekit.scripts.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not any(partial_folder(out).glob(pattern)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    ["work/calibration-*", "output/model.safetensors", "output/.report-*"],
)
def test_a_killed_run_leaves_no_output_and_can_be_finished(
    whole, checkpoint, data, tmp_path, caplog, pattern
):
    out = tmp_path / "out"
    arguments = ["compress", str(checkpoint), "--data", str(data), *TEXT_OPTIONS, "--ratio", "0.5"]
    arguments += ["--out", str(out)]
    kill_when(arguments, out, pattern)
    assert not out.exists()
    assert cli.main(arguments) == 0
    assert "going on after step" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    name = "calibration/routing_statistics.safetensors"
    mine, uninterrupted = load_file(out / name), load_file(whole / name)
    assert mine.keys() == uninterrupted.keys()
    assert all(torch.equal(tensor, uninterrupted[key]) for key, tensor in mine.items())
