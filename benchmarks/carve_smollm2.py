"""Carve SmolLM2-135M into 16 experts and adapt it briefly: perplexity against K, before and after.

    python benchmarks/carve_smollm2.py --model SmolLM2-135M --train wiki.valid --test wiki.test

Each arm cuts every FFN into 16 experts in another way, by which nothing is lost at K = 16. Then only the
experts (and the gains of CMoE's router) are trained for some steps on text of the same kind, with K growing
from 8 to 16 or drawn at random; beside them the dense model, its FFNs trained in the same way. One
JSON line per arm and seed; arms that are there are not run again.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arms import EXPERTS, measure_at, run_missing, train
from moekit.moe import coactivation_partitions, to_cmoe, to_smoe_dropout
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

ARMS: dict[str, dict[str, Any]] = {
    "co-activation": {"partition": "coactivation"},
    "CMoE-style": {"partition": "cmoe"},
    "dense": {},
    "random": {"partition": "random", "steps": 0},
    "weights": {"partition": "weights", "steps": 0},
    "contiguous": {"partition": "contiguous", "steps": 0},
    "random, softmax": {"partition": "random", "combine": "softmax", "steps": 0},
    "random, K by layer": {"partition": "random", "schedule": "random", "k_start": 4},
}


@dataclass(frozen=True, kw_only=True)
class CarveConfig:
    """Carve, measure, adapt, measure."""

    model: str
    """SmolLM2-135M: a path or a hub id."""
    train: Path
    """Plain text to adapt to and to see neurons fire on."""
    test: Path
    """Plain text of the same kind, to measure perplexity on."""
    seeds: tuple[int, ...] = (0,)
    """Of partitions, routers and the order of the text."""
    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = 200
    batch_size: int = 1
    seq_len: int = 128
    learning_rate: float = 2e-4
    eval_tokens: int = 2048
    eval_experts: tuple[int, ...] = (4, 8, 12, 16)
    results: Path = Path("benchmarks/results/carve_smollm2.jsonl")
    threads: int = 1


def read_blocks(tokenizer: Any, path: Path, seq_len: int) -> list[dict[str, Any]]:
    """The text as blocks of `seq_len` tokens."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    blocks = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return [{"input_ids": block, "labels": block} for block in blocks]


def batches(rows: list[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Sixteen blocks at a time in random order, for calibration."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), 16):
        yield {"input_ids": torch.stack([rows[i]["input_ids"] for i in order[start : start + 16]])}


def carve(model: Any, arm: dict[str, Any], rows: list[dict[str, Any]], seed: int) -> None:
    """Cut the FFNs as the arm says."""
    partition = arm.get("partition")
    if partition == "cmoe":
        to_cmoe(model, batches(rows, seed), EXPERTS, EXPERTS // 4, seed=seed)
    elif partition is not None:
        if partition == "coactivation":
            partition = coactivation_partitions(model, batches(rows, seed), EXPERTS, seed=seed)
        to_smoe_dropout(model, EXPERTS, arm.get("combine", "uniform"), seed, partition=partition)


@torch.no_grad()
def perplexity(model: Any, rows: list[dict[str, Any]], config: CarveConfig) -> float:
    """Over the predicted tokens of the first `eval_tokens` of the test text."""
    model.eval()
    total, count = 0.0, 0
    for row in rows[: config.eval_tokens // config.seq_len]:
        total += float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss)
        count += 1
    return math.exp(total / count)


def run(name: str, seed: int, config: CarveConfig) -> dict[str, Any]:
    """Carve one arm with one seed, measure it, train its experts (the dense model's FFNs), measure again."""
    set_seed(seed)
    arm = ARMS[name]
    steps = arm.get("steps", config.steps)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows, test = (read_blocks(tokenizer, path, config.seq_len) for path in (config.train, config.test))
    carve(model, arm, rows, seed)
    row = {"arm": name, "seed": seed, "steps": steps, "tokens_per_step": config.batch_size * config.seq_len}
    row["before"] = measure_at(model, config.eval_experts, lambda: perplexity(model, test, config))
    print(name, seed, row["before"], flush=True)
    if not steps:
        return row
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = ".mlp." in parameter_name
    started = time.perf_counter()
    train(
        model,
        rows,
        (arm.get("schedule", "linear"), arm.get("k_start", EXPERTS // 2), EXPERTS),
        seed=seed,
        steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
    )
    row["seconds"] = time.perf_counter() - started
    row["after"] = measure_at(model, config.eval_experts, lambda: perplexity(model, test, config))
    return row


def main(config: CarveConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    wanted = ((arm, seed) for seed in config.seeds for arm in config.arms)
    run_missing(config.results, ("arm", "seed"), wanted, lambda arm, seed: run(arm, seed, config))


if __name__ == "__main__":
    main(tyro.cli(CarveConfig))
