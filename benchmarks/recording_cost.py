"""What recording costs: `record_routing` around a forward against the bare forward.

    python benchmarks/recording_cost.py

Bare and recorded forwards of random Qwen3-MoE models alternate in one process of one thread, and their CPU
time is compared, so that whatever else the machine does hits both alike; the figure is the median over pairs
of recorded / bare - 1, with a bootstrap interval. Writes `benchmarks/results/recording_cost.json`.
"""

# T tokens

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from moekit.moe import record_routing
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "D=512 F=256 E=32 K=4": {
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "num_attention_heads": 8,
    },
    "8 M: D=192 F=192 E=16 K=2": {
        "hidden_size": 192,
        "moe_intermediate_size": 192,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "head_dim": 48,
        "num_attention_heads": 4,
    },
}


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Measure the cost of recording on this machine."""

    tokens: int = 2048
    """T of a forward, in sequences of `seq_len`."""
    seq_len: int = 256
    repeats: int = 21
    """Pairs of a bare and a recorded forward, after two that do not count."""
    implementations: tuple[str, ...] = ("grouped_mm", "eager")
    """Of the experts."""
    vocab_size: int = 4096
    threads: int = 1
    results: Path = Path("benchmarks/results")


def build(shape: dict[str, int], config: CostConfig) -> Qwen3MoeForCausalLM:
    """Build a random model of that shape."""
    torch.manual_seed(0)
    heads = shape["num_attention_heads"]
    settings = Qwen3MoeConfig(
        **shape, vocab_size=config.vocab_size, num_key_value_heads=heads, norm_topk_prob=True
    )
    return Qwen3MoeForCausalLM(settings).eval()


def seconds(run: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, config: CostConfig) -> dict[str, Any]:
    """Time alternating bare and recorded forwards."""
    ids_BS = torch.randint(config.vocab_size, (config.tokens // config.seq_len, config.seq_len))
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}

    def bare() -> None:
        model(**inputs, use_cache=False)

    pairs = []
    for _ in range(config.repeats + 2):
        plain = seconds(bare)
        with record_routing(model):
            pairs.append((plain, seconds(bare)))
    times = np.array(pairs[2:])
    ratios = times[:, 1] / times[:, 0] - 1
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return {
        "bare_seconds": float(np.median(times[:, 0])),
        "recorded_seconds": float(np.median(times[:, 1])),
        "overhead": float(np.median(ratios)),
        "overhead_95": [float(low), float(high)],
    }


def main(config: CostConfig) -> None:
    """Measure every shape with every implementation, print the table and write the file."""
    torch.set_num_threads(config.threads)
    rows = []
    print("| model | experts | bare, ms | recorded, ms | overhead (95 %) |\n|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        model = build(shape, config)
        for implementation in config.implementations:
            model.set_experts_implementation(implementation)
            row = measure(model, config)
            rows.append({"model": name, "implementation": implementation, **row})
            low, high = row["overhead_95"]
            print(
                f"| {name} | {implementation} | {1e3 * row['bare_seconds']:.0f} | "
                f"{1e3 * row['recorded_seconds']:.0f} | {row['overhead']:.1%} ({low:.1%} to {high:.1%}) |",
                flush=True,
            )
    machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": config.threads}
    result = {"tokens": config.tokens, "repeats": config.repeats, "machine": machine, "rows": rows}
    config.results.mkdir(parents=True, exist_ok=True)
    file = config.results / "recording_cost.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(CostConfig))
