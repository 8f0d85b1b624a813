"""Checkpoints stored in eight and four bits are compressed, in memory and layer by layer."""

import json
from pathlib import Path

import pytest
import torch
from moekit.scripts import cli
from moekit.scripts.load import load_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from .tiny_checkpoints import TEXT_OPTIONS, VOCABULARY, tiny_qwen, write_checkpoint

BLOCK = 128
LARGEST = 448.0
"""Of an E4M3."""


def change(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict) -> Path:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"quantization_config": quantisation})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in eight bits, and the scale of each block of 128 x 128."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / LARGEST
    stored = (blocks / scales[:, None, :, None]).view(weight.shape)
    return stored.to(torch.float8_e4m3fn), scales


def write_fp8(folder: Path) -> Path:
    """As DeepSeek stores its weights: every projection whose sides allow it."""
    model = tiny_qwen(hidden_size=BLOCK, moe_intermediate_size=2 * BLOCK, head_dim=64).bfloat16()
    write_checkpoint(folder, model)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = in_blocks(tensors[name])
    method = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return change(folder, tensors, method)


def write_mxfp4(folder: Path) -> Path:
    """As GPT-OSS stores its experts: two numbers of four bits to a byte, a scale for 32 of them."""
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    write_checkpoint(folder, GptOssForCausalLM(config).bfloat16())
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape  # as they are used: inputs first
        packed = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*packed, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(packed, 123, dtype=torch.uint8)
    return change(folder, tensors, {"quant_method": "mxfp4"})


WRITERS = {"fp8": write_fp8, "mxfp4": write_mxfp4}


def test_blocks_of_fp8_are_multiplied_by_their_scales(tmp_path):
    folder = write_fp8(tmp_path / "fp8")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    wanted = (stored[name].float() * scales).bfloat16()
    fused = load_model(str(folder)).state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(fused[3, : 2 * BLOCK], wanted)


@pytest.mark.parametrize("form", ["moekit", "stock"])
@pytest.mark.parametrize("method", WRITERS)
def test_compression(method, form, data, tmp_path, capsys):
    folder = WRITERS[method](tmp_path / method)
    words = ["compress", str(folder), *TEXT_OPTIONS, "--data", str(data), "--experts", "4", "--no-report"]
    words += ["--method", "reap", "--form", form]
    found = []
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        assert cli.main([*words, "--out", str(tmp_path / name), *more]) == 0
        assert f"{method} weights become bfloat16, in memory and in the result" in capsys.readouterr().err
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert config.get("quantization_config", {}).get("quant_method") in (None, "moekit")
        found.append(load_model(str(tmp_path / name)).state_dict())
    whole, streamed = found
    assert whole.keys() == streamed.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, streamed[name]), name


def test_a_damaged_scale_is_found(data, tmp_path, capsys):
    folder = write_fp8(tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = ["compress", str(folder), *TEXT_OPTIONS, "--data", str(data), "--experts", "4", "--no-report"]
    for more in ([], ["--stream"]):
        assert cli.main([*words, *more, "--out", str(tmp_path / "out")]) == 2
        assert "NaN" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
