"""Peak memory of compression against the number of layers: in memory, and one layer at a time.

    python benchmarks/compress_memory.py

Random Mixtral-like checkpoints of one width and 4, 8, 16 and 32 layers are written file by file, compressed
by `moekit compress` in processes of their own, and the largest resident set of each is noted, less that of a
process that only imports the same. Writes `benchmarks/results/compress_memory.json`, the figure and the table
of `docs/compress.md`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from dropout_report import insert_table, markdown
from matplotlib.figure import Figure
from moekit.scripts.prepare import bundled_folder
from quality_report import PALETTE
from safetensors.torch import save_file
from transformers import AutoTokenizer, MixtralConfig


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Measure memory."""

    layers: tuple[int, ...] = (4, 8, 16, 32)
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_experts: int = 8
    calibration_tokens: int = 4096
    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/compress.md")


def write_checkpoint(config: MemoryConfig, folder: Path, num_layers: int) -> int:
    """A random checkpoint, a file for each layer; returns the bytes of its tensors."""
    tokenizer: Any = AutoTokenizer.from_pretrained(bundled_folder())
    tokenizer.save_pretrained(folder)
    model_config = MixtralConfig(
        vocab_size=2048,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=config.num_experts,
        max_position_embeddings=512,
        architectures=["MixtralForCausalLM"],
        dtype="float32",
        tie_word_embeddings=False,
    )
    model_config.save_pretrained(folder)
    wide, inner, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {
            key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, name))
        total += sum(tensor.numel() * 4 for tensor in tensors.values())

    for number in range(num_layers):
        start = f"model.layers.{number}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{start}self_attn.q_proj.weight": (wide, wide),
            f"{start}self_attn.k_proj.weight": (kv, wide),
            f"{start}self_attn.v_proj.weight": (kv, wide),
            f"{start}self_attn.o_proj.weight": (wide, wide),
            f"{start}input_layernorm.weight": (wide,),
            f"{start}post_attention_layernorm.weight": (wide,),
            f"{start}block_sparse_moe.gate.weight": (config.num_experts, wide),
        }
        for expert in range(config.num_experts):
            inside = f"{start}block_sparse_moe.experts.{expert}."
            shapes |= {
                f"{inside}w1.weight": (inner, wide),
                f"{inside}w2.weight": (wide, inner),
                f"{inside}w3.weight": (inner, wide),
            }
        write(f"model-{number:05d}.safetensors", shapes)
    outside = {"model.embed_tokens.weight": (2048, wide), "model.norm.weight": (wide,)}
    write("model-rest.safetensors", outside | {"lm_head.weight": (2048, wide)})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def peak(words: list[str]) -> int:
    """Largest resident set of a process, bytes.

    Args:
        words: Of the command line, after the interpreter.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen([sys.executable, *words], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"failed: {' '.join(words)}")
    return usage.ru_maxrss * 1024


def command(config: MemoryConfig, model: Path, out: Path, *more: str) -> list[str]:
    """To halve the experts of a checkpoint."""
    words = ["-m", "moekit.scripts.cli", "compress", str(model), "--method", "reap", "--no-report"]
    words += ["--experts", str(config.num_experts // 2), "--data", str(bundled_folder() / "sample.jsonl")]
    words += ["--seq-len", "256", "--calibration-tokens", str(config.calibration_tokens)]
    return [*words, "--eval-tokens", "512", "--batch-size", "4", "--out", str(out), *more]


def measure(config: MemoryConfig) -> list[dict[str, Any]]:
    """A row for each number of layers."""
    base = peak(["-c", "import moekit.scripts.compress"])
    rows: list[dict[str, Any]] = []
    for number in config.layers:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            size = write_checkpoint(config, folder / "model", number)
            row: dict[str, Any] = {"layers": number, "checkpoint": size, "base": base}
            row["in memory"] = peak(command(config, folder / "model", folder / "whole")) - base
            row["streamed"] = peak(command(config, folder / "model", folder / "parts", "--stream")) - base
            rows.append(row)
            print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each number of layers."""
    names = ["layers", "checkpoint, MB", "in memory, MB", "`--stream`, MB"]
    keys = ("checkpoint", "in memory", "streamed")
    return markdown(names, [[str(row["layers"]), *(f"{row[k] / 1e6:,.0f}" for k in keys)] for row in rows])


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Peak memory against layers."""
    made = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = made.subplots()
    layers = [row["layers"] for row in rows]
    lines = (("checkpoint", "#9aa0a6", "--"), ("in memory", PALETTE[1], "-"), ("streamed", PALETTE[0], "-"))
    for name, colour, style in lines:
        values = [row[name] / 1e6 for row in rows]
        label = {"checkpoint": "size of the checkpoint", "streamed": "one layer at a time"}.get(name, name)
        axes.plot(layers, values, style, color=colour, marker="o", markersize=4, label=label)
    axes.set_xlabel("layers")
    axes.set_ylabel("peak memory, MB")
    axes.set_ylim(bottom=0)
    axes.set_xticks(layers)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return made


def main(config: MemoryConfig) -> None:
    """Measure, and write file, figure and table."""
    rows = measure(config)
    text = json.dumps({"rows": rows}, indent=1) + "\n"
    (config.results / "compress_memory.json").write_text(text, encoding="utf-8")
    figure(rows).savefig(config.document.parent / "figures" / "compress_memory.png", dpi=120)
    document = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(document, "compress_memory", table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(MemoryConfig))
