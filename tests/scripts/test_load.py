import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from moekit.moe import UnsupportedModelError, expert_layers, save_checkpoint
from moekit.scripts import load
from moekit.scripts.load import load_model, load_tokenizer, open_source, skeleton
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SwitchTransformersForConditionalGeneration,
)

from .tiny_checkpoints import VOCABULARY, tiny_qwen, tiny_switch, write_checkpoint


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "copied")


def test_a_whole_checkpoint_loads(checkpoint):
    model, original = load_model(str(checkpoint)), tiny_qwen()
    assert not model.training
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in original.state_dict().items())
    assert load_model(str(checkpoint), dtype="bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(str(checkpoint))("ab").input_ids


def test_sequence_to_sequence_models_load_by_their_own_class(tmp_path):
    folder = write_checkpoint(tmp_path / "switch", tiny_switch())
    assert type(load_model(str(folder))) is SwitchTransformersForConditionalGeneration


def test_sharded_checkpoints_load(tmp_path):
    folder = write_checkpoint(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    load_model(str(folder))


def test_the_skeleton_has_the_shapes_of_a_compressed_checkpoint(tmp_path):
    model = tiny_qwen()
    for layer, num_experts in zip(expert_layers(model), (3, 5), strict=True):
        layer.replace_experts(layer.experts()[:num_experts], [min(e, num_experts - 1) for e in range(8)])
    save_checkpoint(model, tmp_path)
    shapes = {
        name: tensor.shape for name, tensor in skeleton(open_source(str(tmp_path))).state_dict().items()
    }
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "does not exist: there is no such folder"),
        ("./missing", "does not exist"),
        ("a/b/c", "does not exist"),
        ("nobody/nothing", "is not a folder here and cannot be downloaded"),
    ],
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        open_source(name)


def test_a_download_takes_the_licence_and_the_tokenizer_along(checkpoint, monkeypatch):
    def download(name, *, allow_patterns, ignore_patterns):
        for file in ("LICENSE", "LICENSE.txt", "NOTICE", "tekken.json", "qwen.tiktoken", "model.safetensors"):
            assert any(fnmatch(file, pattern) for pattern in allow_patterns), file
        assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(load, "snapshot_download", download)
    assert open_source("owner/name").folder == checkpoint


def test_a_file_instead_of_its_folder(checkpoint):
    with pytest.raises(ValueError, match="is a file; give the folder"):
        open_source(str(checkpoint / "model.safetensors"))


def test_a_folder_without_config(copied):
    (copied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json: it is not a Transformers checkpoint$"):
        open_source(str(copied))
    (copied / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="PEFT adapter"):
        open_source(str(copied))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "holds a list"), ("[" * 100_000, "nested too deeply")],
)
def test_a_damaged_config(copied, text, message):
    (copied / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_source(str(copied))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_model_type_that_transformers_does_not_know(copied):
    change_config(copied, model_type="imaginary_moe")
    with pytest.raises(ValueError, match="cannot read the config"):
        open_source(str(copied))


def test_quantised_weights(copied):
    change_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantised \(gptq\), and quantised experts cannot be merged"):
        open_source(str(copied))


def test_quantised_weights_that_can_be_undone(tmp_path):
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    folder = write_checkpoint(tmp_path / "plain", GptOssForCausalLM(config).bfloat16())
    tensors = load_file(folder / "model.safetensors")
    for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        plain = f"model.layers.0.mlp.experts.{name}"
        del tensors[plain]
        # E2M1 holds 1.0 as 2, two to a byte; a scale of 120 is 2 ** -7.
        tensors[f"{plain}_blocks"] = torch.full((4, rows, columns // 32, 16), 0x22, dtype=torch.uint8)
        tensors[f"{plain}_scales"] = torch.full((4, rows, columns // 32), 120, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    model = load_model(str(folder))
    assert bool((expert_layers(model)[0].experts()[0].up == 2**-7).all())
    save_checkpoint(model, tmp_path / "written")
    again = load_model(str(tmp_path / "written")).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_pickled_weights_only(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle only \(pytorch_model.bin\).*save_pretrained"):
        open_source(str(copied))


def test_no_weights_at_all(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        open_source(str(copied))


@pytest.mark.parametrize(
    ("kept", "message"), [(-100, "is truncated: it has"), (50, "ends within its header")]
)
def test_a_truncated_file(copied, kept, message):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=message):
        open_source(str(copied))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04 a zip file, not weights", "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "header cannot be read"),
    ],
)
def test_a_file_of_another_kind(copied, content, message):
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(str(copied))


def test_shards_that_are_missing_or_truncated(tmp_path):
    folder = write_checkpoint(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shards[1].name}' is truncated"):
        open_source(str(folder))
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"1 of the {len(shards)} shards .* missing, {shards[1].name}"):
        open_source(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(copied, value):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    damaged = next(name for name in tensors if name.endswith("k_proj.weight"))
    tensors[damaged][3, 2] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensor '{damaged}' of .* holds NaN or infinity"):
        load_model(str(copied))


def test_tensors_that_the_checkpoint_lacks(copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lack 1 tensors .* '{lost}' the first"):
        load_model(str(copied))


def test_a_dense_model(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = write_checkpoint(tmp_path / "dense", LlamaForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no routed experts"):
        open_source(str(folder))


def test_a_device_that_is_not_there(checkpoint):
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        load_model(str(checkpoint), device="nonsense")


def test_a_folder_without_tokenizer(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer.json"):
        load_tokenizer(str(copied))
    (copied / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(copied))


def sealed(header: object, data: bytes = b"0000") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F99"}, "tensor 'a' has the unknown dtype 'F99'"),
        ({"dtype": []}, r"the unknown dtype \[\]"),
        ({"shape": [10**30]}, "which is not a list of sizes"),
        ({"shape": [-1]}, "which is not a list of sizes"),
        ({"shape": [2**62] * 100}, "which is not a list of sizes"),
        ({"shape": [2]}, r"the shape \[2\] of F32 but 4 bytes"),
        ({"data_offsets": [0, "x"]}, "which are not a start and an end"),
        ({"data_offsets": [0]}, "which are not a start and an end"),
        ({"data_offsets": [4, 0]}, "but -4 bytes"),
        (None, "no table of dtype, shape and data_offsets"),
    ],
)
def test_a_header_that_lies(copied, entry, message):
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = {"a": None if entry is None else whole | entry}
    (copied / "model.safetensors").write_bytes(sealed(header))
    with pytest.raises(ValueError, match=f"header of .*{message}"):
        open_source(str(copied))


def test_a_header_that_is_nested_too_deeply(copied):
    (copied / "model.safetensors").write_bytes(sealed(b"[" * 100_000))
    with pytest.raises(ValueError, match="its header cannot be read"):
        open_source(str(copied))


@pytest.mark.parametrize("name", [5, None, "../model.safetensors", "/etc/passwd", "a\0b"])
def test_an_index_that_names_no_file_beside_it(copied, name):
    (copied / "model.safetensors").unlink()
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(ValueError, match="which is not the name of a file beside it"):
        open_source(str(copied))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "abc"}, "cannot read the config .*hidden_size"),
        ({"hidden_size": 0}, "."),
        ({"num_experts": -1}, "num_experts=-1; it must be a whole number from 0 to 100,000"),
        ({"num_experts": 2.5}, "num_experts=2.5; it must be"),
        ({"num_experts": 10**9}, "num_experts=1000000000; it must be"),
        ({"num_hidden_layers": 200_000}, "num_hidden_layers=200000; it must be .* to 10,000"),
        ({"num_experts": 32, "num_experts_per_tok": 99}, "99 of the 32 experts"),
        ({"num_experts": 90_000}, "parameters, but its files hold"),
        ({"architectures": 5}, "."),
        ({"dtype": "float99"}, "float99"),
        ({"quantization_config": "x"}, "."),
        ({"rope_parameters": "x"}, "."),
    ],
)
def test_a_config_that_cannot_be(copied, changes, message):
    path = copied / "config.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    # Transformers 5 writes the count under the other name, which would win.
    if "num_experts" in changes:
        table.pop("num_local_experts", None)
    path.write_text(json.dumps(table | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_source(str(copied))


def test_a_config_without_experts_is_of_a_dense_model(copied):
    change_config(copied, num_experts=0, num_local_experts=0)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        open_source(str(copied))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_damaged_generation_config(copied, text):
    (copied / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"generation_config.json' (holds a list|is n)"):
        open_source(str(copied))


ENTRY = {"num_experts": 4, "num_router_rows": 8, "router": "redirect"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "'layers' is not a table"),
        ({"layers": 5}, "'layers' is not a table"),
        ({"layers": {"model.layers.0.mlp": 5}}, "5 is not an entry"),
        ({"layers": {"model.layers.0.mlp": {}}}, "None experts behind None router rows"),
        ({"layers": {"model.layers.0.mlp": ENTRY | {"num_experts": -5}}}, "-5 experts behind 8"),
        ({"layers": {"model.layers.0.mlp": ENTRY | {"num_experts": 4.5}}}, "4.5 experts behind 8"),
        ({"layers": {"model.layers.0.mlp": ENTRY | {"num_experts": 10**12}}}, "behind 8 router rows"),
        ({"layers": {"model.layers.0.mlp": ENTRY | {"num_router_rows": 10**12}}}, "built with 8 experts"),
        ({"layers": {"model.layers.0.mlp": ENTRY | {"router": "evil"}}}, "is not full, redirect"),
        ({"layers": {"../../x": ENTRY}}, r"names layer '../../x', which is not among model.layers.0.mlp"),
        ({"layers": {"model.layers.0.mlp": ENTRY}, "version": 99}, "moekit format 99"),
    ],
)
def test_a_table_of_compressed_layers_that_cannot_be(copied, table, message):
    change_config(copied, quantization_config={"quant_method": "moekit", **table})
    with pytest.raises(ValueError, match=f"quantization_config of .* cannot be carried out: .*{message}"):
        open_source(str(copied))


def test_an_expert_that_the_checkpoint_lacks(copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if ".experts." in name)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.experts.\S+' has the shape \S*7, .* in the files and \S*8,"
    ):
        load_model(str(copied))


@pytest.mark.parametrize("part", [".experts.", "model.norm.weight"])
def test_a_tensor_of_another_shape(copied, part):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"'model.\S+' (has the shape .* in the files and|is incomplete)"):
        load_model(str(copied))


@pytest.mark.parametrize("count", [4, 10])
def test_a_config_that_counts_other_experts(copied, count):
    change_config(copied, num_experts=count, num_local_experts=count)
    with pytest.raises(
        ValueError,
        match=rf"'model.layers.\{{0, 1\}}.mlp.\S+' has the shape .*8, .* in the files and \S*{count},",
    ):
        load_model(str(copied))
