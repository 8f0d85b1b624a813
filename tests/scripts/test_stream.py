"""Compression of one decoder layer at a time gives what compression in memory gives."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from moekit.moe.discovery import expert_layers
from moekit.moe.layer_stream import LayerStream
from moekit.moe.layer_walk import NotStreamableError
from moekit.scripts import cli, staging, stream
from moekit.scripts.checkpoint_files import tensor_bytes
from moekit.scripts.load import open_source, skeleton
from moekit.scripts.staging import MARGIN_BYTES, partial_folder
from moekit.scripts.stream_checks import size_in_bytes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..moe.families import FAMILIES
from ..moe.tiny_models import Family
from .tiny_checkpoints import TEXT_OPTIONS, VOCABULARY, tiny_qwen, write_checkpoint

STREAMED = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe"]


def family_model(name: str) -> PreTrainedModel:
    """The family's tiny model, with the vocabulary of the tests' tokenizer."""
    row = FAMILIES[name]
    assert isinstance(row, Family)
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1}
    return dataclasses.replace(row, overrides=row.overrides | tokens)()


def compress(model: Path, data: Path, out: Path, *more: object) -> int:
    given = ["--data", str(data), "--experts", "4", "--no-report", "--out", str(out)]
    return cli.main(["compress", str(model), *TEXT_OPTIONS, *given, *map(str, more)])


def same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Both checkpoints load to the same weights, and say the same in plan and config."""
    mine, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)
    configs = [json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (one, other)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", STREAMED)
def test_families(family, data, tmp_path):
    model = write_checkpoint(tmp_path / "model", family_model(family))
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        options = ("--method", "reap", "--seq-len", 16, *more)
        assert compress(model, data, tmp_path / name, *options) == 0
    same(tmp_path / "streamed", tmp_path / "whole", tolerance=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "m-smoe", "--grouping", "uniform"),
        ("--method", "m-smoe", "--grouping", "uniform", "--similarity", "weights"),
        ("--method", "hc-smoe"),
        ("--method", "ream"),
        ("--method", "reap", "--sequential", "on"),
        ("--method", "reap", "--form", "stock"),
        ("--method", "mone"),
        ("--method", "ean", "--router", "constant", "--rank", 4),
        ("--method", "aimer", "--rank", 4, "--sparse-rows", 0.25),
        ("--method", "frequency", "--dtype", "bfloat16"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_methods(options, checkpoint, data, tmp_path):
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        assert compress(checkpoint, data, tmp_path / name, *options, *more) == 0
    same(tmp_path / "streamed", tmp_path / "whole", tolerance=1e-5)
    plans = [json.loads((tmp_path / n / "plan.json").read_text())["layers"] for n in ("whole", "streamed")]
    assert plans[0] == plans[1]
    sizes = [
        json.loads((tmp_path / n / "run.json").read_text())["metrics"]["footprint"]
        for n in ("whole", "streamed")
    ]
    assert sizes[0] == sizes[1]


def test_super_experts(checkpoint, data, tmp_path):
    """Two of one model, of outputs of unlike size: both are protected, streamed or not."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    layers = expert_layers(model)
    loud = [(layers[0], 5, 3e3), (layers[-1], 2, 1e5)]
    with torch.no_grad():
        for layer, expert, factor in loud:
            layer.experts()[expert].down.mul_(factor)
    changed = write_checkpoint(tmp_path / "model", model)
    plans = {}
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        options = ("--method", "aimer", "--sequential", "off", *more)  # which would drop them
        assert compress(changed, data, tmp_path / name, *options) == 0
        plans[name] = json.loads((tmp_path / name / "plan.json").read_text())
    expected = [f"{layer.name} expert {expert}" for layer, expert, _ in loud]
    assert plans["whole"]["settings"]["protected"] == expected
    assert plans["streamed"]["layers"] == plans["whole"]["layers"]
    assert plans["streamed"]["settings"] == plans["whole"]["settings"] | {"sequential": False}


def test_tied_embeddings_and_several_files(data, tmp_path):
    model = write_checkpoint(
        tmp_path / "model", tiny_qwen(tie_word_embeddings=True, num_hidden_layers=3), max_shard_size="40KB"
    )
    assert len(list(model.glob("*.safetensors"))) > 3
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        assert compress(model, data, tmp_path / name, "--method", "reap", *more) == 0
    same(tmp_path / "streamed", tmp_path / "whole")


def test_one_layer_is_there_at_a_time(checkpoint):
    source = open_source(str(checkpoint))
    model = skeleton(source)
    files = sorted(checkpoint.glob("*.safetensors"))
    stream = LayerStream(model, files, dtype=torch.float32, device=torch.device("cpu"))
    stream.load_outside()

    def loaded() -> set[int]:
        return {
            int(name.split(".")[2])
            for name, tensor in model.state_dict().items()
            if name.startswith("model.layers.") and tensor.device.type != "meta"
        }

    assert loaded() == set()
    for index in range(len(stream)):
        stream.load(index)
        assert loaded() == {index}
        stream.drop(index)
    assert loaded() == set()


def killed_at(arguments: list[str], out: Path, pattern: str) -> None:
    code = "import sys; from moekit.scripts.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ) as process:
        while process.poll() is None and not any(partial_folder(out).glob(pattern)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern", ["work/hidden/*/into-1-*", "work/layers/layer-00001*", "work/stream.json", "output/model-*"]
)
@pytest.mark.parametrize("sequential", ["on", "off"])
def test_a_killed_run_goes_on_to_the_same_bytes(pattern, sequential, data, tmp_path):
    model = write_checkpoint(tmp_path / "model", tiny_qwen(num_hidden_layers=4))
    options = ("--method", "reap", "--stream", "--sequential", sequential)
    assert compress(model, data, tmp_path / "whole", *options) == 0
    out = tmp_path / "killed"
    given = ["--data", str(data), "--experts", "4", "--no-report", "--out", str(out)]
    arguments = ["compress", str(model), *TEXT_OPTIONS, *given, *map(str, options)]
    killed_at(arguments, out, pattern)
    assert not out.exists()
    assert cli.main(arguments) == 0
    files = sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors"))
    assert files == sorted(path.name for path in out.glob("model-*.safetensors"))
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory-limit", "1KB", "--stream"), r"--memory-limit 1KB is too small: "),
        (("--memory-limit", "much", "--stream"), "--memory-limit 'much' is not a size"),
        (("--memory-limit", "1GB"), "--memory-limit is of --stream; add that"),
        (("--stream", "--heal", "router"), "which --heal cannot do with"),
        (("--stream", "--grouping", "adaptive"), "--stream plan a layer before the next is known"),
        (("--stream", "--rank", "1000"), "rank 1000 is larger than the smaller side"),
    ],
)
def test_what_cannot_be(checkpoint, data, tmp_path, capsys, words, message):
    assert compress(checkpoint, data, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_is_that_of_compression_in_memory(checkpoint, data, tmp_path):
    given = ["compress", str(checkpoint), *TEXT_OPTIONS, "--data", str(data), "--experts", "4"]
    given += ["--method", "reap", "--sequential", "off"]
    found = {}
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        assert cli.main([*given, "--out", str(tmp_path / name), *more]) == 0
        metrics = json.loads((tmp_path / name / "run.json").read_text())["metrics"]
        assert metrics["reload_logit_difference"] < 1e-5
        found[name] = metrics["fidelity"]
    for key in ("perplexity_original", "perplexity_compressed", "kl", "top1_agreement", "num_tokens"):
        mine, theirs = (found[name]["overall"][key] for name in ("streamed", "whole"))
        assert mine == pytest.approx(theirs, rel=1e-4), key
    assert [d["domain"] for d in found["streamed"]["domains"]] == [
        d["domain"] for d in found["whole"]["domains"]
    ]
    assert "Perplexity" in (tmp_path / "streamed" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["glm_moe_dsa", "hy_v4", "zaya"])
def test_a_family_that_cannot_be_streamed(family, data, tmp_path, capsys, monkeypatch):
    model = write_checkpoint(tmp_path / "model", family_model(family))
    monkeypatch.setattr(LayerStream, "load", lambda *_: pytest.fail("work was begun"))
    assert compress(model, data, tmp_path / "out", "--stream", "--method", "reap") == 2
    assert f"({family}) cannot be run one decoder layer at a time" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"]
)
def test_weights_that_are_no_numbers(name, checkpoint, data, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = float("nan")
    broken = write_checkpoint(tmp_path / "model", model)
    assert compress(broken, data, tmp_path / "out", "--stream", "--method", "reap") == 2
    assert (
        f"tensor '{name}' of '{broken / 'model.safetensors'}' holds NaN or infinity"
        in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing that could be gone on with


@pytest.mark.parametrize(("name", "is_left"), [("drop", True), ("load", False)])
def test_an_interruption_leaves_only_what_can_be_gone_on_with(
    name, is_left, checkpoint, data, tmp_path, monkeypatch
):
    """A layer that is done, not one that is begun."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerStream, name, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        compress(checkpoint, data, tmp_path / "out", "--stream", "--method", "reap")
    assert (partial_folder(tmp_path / "out") / "work" / "stream.json").is_file() == is_left
    assert any(tmp_path.iterdir()) == is_left


def test_the_disk_is_asked_before_any_work(checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LayerStream, "load", lambda *_: pytest.fail("work was begun"))
    result = sum(tensor.nbytes for tensor in load_file(checkpoint / "model.safetensors").values())
    calibration, held_out, numbers = 2048 // 32, 512 // 32, 32 * 32 * 4
    hidden = 2 * numbers * (calibration + 2 * held_out)
    monkeypatch.setattr(staging, "_free_bytes", lambda _: result + MARGIN_BYTES + hidden // 2)
    out = ("--data", data, "--experts", 4, "--stream", "--method", "reap", "--out", tmp_path / "out")
    assert cli.main(["compress", str(checkpoint), *TEXT_OPTIONS, *map(str, out)]) != 0
    assert "bytes are needed there and" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_large_layers_are_written_in_shards(checkpoint, data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out, size in ((whole, "5GB"), (cut, "8KB")):
        options = ("--stream", "--method", "reap", "--max-shard-size", size)
        assert compress(checkpoint, data, out, *options) == 0
    same(cut, whole)
    sizes = [path.stat().st_size for path in cut.glob("model-*.safetensors")]
    assert len(sizes) > len(list(whole.glob("model-*.safetensors")))
    for out in (whole, cut):
        index = json.loads((out / "model.safetensors.index.json").read_text())
        tensors = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert index["metadata"]["total_size"] >= sum(
            tensors[n].nbytes for n in index["weight_map"] if n in tensors
        )
        assert index["metadata"]["total_size"] == tensor_bytes(out)


@pytest.mark.parametrize("part", ["model.layers.1.", "lm_head."])
@pytest.mark.parametrize("change", [1.0, 1e-6])
def test_a_checkpoint_that_changed_on_the_disk_is_refused(
    part, change, checkpoint, data, tmp_path, monkeypatch, capsys
):
    """What is read back is what was in memory, bit for bit, or the run fails."""
    own, changed = stream.write_index, []

    def damaged(parts: Path, folder: Path) -> None:
        own(parts, folder)
        for file in sorted(folder.glob("model-*.safetensors")):
            tensors = load_file(file)
            if names := [name for name in tensors if name.startswith(part)]:
                changed.append(names[-1])
                tensors[names[-1]].view(-1)[-1] += change
                file.unlink()
                save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(stream, "write_index", damaged)
    assert compress(checkpoint, data, tmp_path / "out", "--stream", "--method", "reap") == 2
    assert f"tensor '{changed[0]}' was changed by writing and reading it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bfloat16"),
        ("--rank", 4, "--router", "constant", "--dtype", "bfloat16"),
        ("--form", "stock"),
        ("--sequential", "on", "--batch-size", 3),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_way_is_read_back(options, checkpoint, data, tmp_path):
    assert compress(checkpoint, data, tmp_path / "out", "--stream", "--method", "reap", *options) == 0
    found = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert 0 <= found["reload_logit_difference"] < 1e-2


def test_files_that_lack_a_tensor(data, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    lost = next(name for name in tensors if "layers.1." in name and "q_proj" in name)
    del tensors[lost]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert compress(model, data, tmp_path / "out", "--stream") == 2
    assert "lack 'self_attn.q_proj.weight' of decoder layer 1" in capsys.readouterr().err


def test_layers_that_cannot_be_run_alone():
    with pytest.raises(NotStreamableError, match="are not in one list of decoder layers"):
        LayerStream(FAMILIES["switch_transformers"](), [], dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(("text", "size"), [("1KB", 1000), (" 2.5 GB", 2_500_000_000), ("3mb", 3_000_000)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size
