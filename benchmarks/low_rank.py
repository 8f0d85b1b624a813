"""Experts as U V + S: what rank and rows are worth at equal bytes, one-shot, healed, and pruned slowly.

    python benchmarks/low_rank.py --model MODEL --name NAME --data valid.jsonl.gz --train train.jsonl.gz

All arms have half the bytes of the experts. *One-shot*: the rows with the largest residual. *KD*: all weights
learn from the labels and 0.2 KL. *LoSparse*: the same training begins with all rows and prunes them. Beside
them half of the experts by EAN, equally healed. A seed chooses the calibration text and the training's
batches. Appends to `benchmarks/results/low_rank.jsonl` (rows that are there are not run again) and writes the
table of `docs/compress.md`.
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from compress_rivals import RivalsConfig, Setting, heal, read
from dropout_report import insert_table, markdown
from fishery import interval
from moekit.compress import METHODS, apply_plan
from moekit.compress.low_rank import factorise_layer
from moekit.moe import expert_layers
from moekit.moe.samples import InputSamples
from moekit.scripts.calibrate import record
from moekit.scripts.row_healing import row_pruner

EAN = "half of the experts (EAN)"
SHARES = (0.0, 0.1, 0.25, 0.4)
"""Of the rows that S holds."""
STAGES = ("one-shot", "KD", "LoSparse")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(RivalsConfig):
    """Compare splits of the same bytes between rank and rows."""

    results: Path = Path("benchmarks/results/low_rank.jsonl")
    document: Path = Path("docs/compress.md")


def rank_at_half(layer: Any, rows: float) -> int:
    """The rank with which factors and rows take half of the bytes of an expert."""
    expert = layer.experts()[0]
    inner, outer = expert.width * (1 if expert.gate is None else 2), expert.hidden_size
    whole = inner * outer + expert.width * outer
    return round((0.5 - rows) * whole / (inner + outer + expert.width + outer))


def split_name(rank: int, rows: float) -> str:
    """Of an arm."""
    return f"rank {rank}, {rows:.0%} of the rows"


def run_seed(setting: Setting, seed: int, done: set[tuple[Any, ...]]) -> None:
    """All arms of one seed that are not there yet."""
    config: Any = setting.config
    samples = InputSamples()
    layers = expert_layers(setting.original)
    statistics = record(setting.original, layers, setting.calibration_blocks(seed), 8, samples=samples)
    arms: list[tuple[str, float | None]] = [(EAN, None)]
    arms += [(split_name(rank_at_half(layers[0], rows), rows), rows) for rows in SHARES]
    for arm, rows in arms:
        for stage in STAGES if rows else STAGES[:2]:
            if (config.name, arm, stage, seed) in done:
                continue
            begin, model = time.perf_counter(), copy.deepcopy(setting.original)
            if rows is None:
                apply_plan(model, METHODS["ean"](layers, statistics, experts=layers[0].num_experts // 2))
            else:
                for layer in expert_layers(model):
                    share = 1.0 if stage == "LoSparse" else rows
                    factorise_layer(layer, rank_at_half(layers[0], rows), share, samples.layers[layer.name])
            if stage != "one-shot":
                pruner = row_pruner(model, rows or 0.0, config.heal_steps) if stage == "LoSparse" else None
                extra = [] if pruner is None else [pruner]
                options: dict[str, Any] = {"steps": config.heal_steps, "seed": seed, "callbacks": extra}
                heal(model, setting.original, setting.healing_rows, "kd", **options)
                if pruner is not None:
                    pruner.finish()
            row = {"model": config.name, "arm": arm, "stage": stage, "seed": seed}
            row |= {"seconds": time.perf_counter() - begin} | setting.measure(model)
            with config.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(config.name, arm, stage, seed, f"KL {row['kl']:.3f}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds with 95 % intervals."""
    cells = []
    for model, arm, stage in dict.fromkeys((row["model"], row["arm"], row["stage"]) for row in rows):
        found = [row for row in rows if (row["model"], row["arm"], row["stage"]) == (model, arm, stage)]
        numbers = [
            interval([float(row["kl"]) for row in found]),
            interval([float(row["top1_agreement"]) for row in found]),
            interval([float(row["accuracy"].get("tasks", 0.0)) for row in found]),
        ]
        cells.append([model, arm, stage, *numbers, f"{found[0]['bytes'] / 1e6:.2f}"])
    return markdown(["model", "experts", "stage", "KL", "top-1 agreement", "answers right", "MB"], cells)


def main(config: LowRankConfig) -> None:
    """Run what is missing, then report."""
    torch.set_num_threads(config.threads)
    lines = config.results.read_text(encoding="utf-8").splitlines() if config.results.exists() else []
    keys = ("model", "arm", "stage", "seed")
    done = {tuple(row[key] for key in keys) for row in map(json.loads, lines)}
    setting = read(config)
    for seed in config.seeds:
        run_seed(setting, seed, done)
    rows = [json.loads(line) for line in config.results.read_text(encoding="utf-8").splitlines()]
    text = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(text, "low_rank", table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(LowRankConfig))
