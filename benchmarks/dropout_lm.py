"""Language modelling from scratch: SMoE-Dropout against dense, learned, hash and random routing.

    python benchmarks/dropout_lm.py --data input.txt --seeds 0 1 2

Every arm starts from the same weights (of its seed), has the same number of FFN parameters (the frozen
routers come on top, as buffers), and takes the same steps on the same characters. Afterwards each model is
evaluated on the held-out tenth of the text at K = E/4, E/2 and E active experts, in bits per character. The
dense arms have no K. One JSON line per arm and seed is appended, and arms that are there are not run again.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arms import EXPERTS, measure_at, run_missing, train
from moekit.moe import add_ffn_dropout, to_smoe_dropout
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

ARMS: dict[str, dict[str, Any]] = {
    "SMoE-Dropout, linear": {"schedule": "linear"},
    "SMoE-Dropout, exponential": {"schedule": "exponential"},
    "SMoE-Dropout, cosine": {"schedule": "cosine"},
    "SMoE-Dropout, random k": {"schedule": "random"},
    "SMoE-Dropout, constant k = E/2": {"schedule": "constant", "k_end": EXPERTS // 2},
    "learned router, k = E/2": {"schedule": "constant", "k_end": EXPERTS // 2, "router": "learned"},
    "hash by token": {"schedule": "constant", "k_end": EXPERTS // 2, "router": "hash", "combine": "uniform"},
    "THOR": {"schedule": "constant", "k_end": EXPERTS // 2, "router": "thor", "combine": "uniform"},
    "dense": {},
    "dense + dropout": {"dropout": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class LanguageModellingConfig:
    """Train every arm from scratch on characters and evaluate it at several K."""

    data: Path
    """A plain text file; its last tenth is held out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = 1200
    batch_size: int = 8
    seq_len: int = 128
    learning_rate: float = 2e-3
    k_start: int = EXPERTS // 2
    """For the growing schedules; E/2 is the release's."""
    results: Path = Path("benchmarks/results/dropout_lm.jsonl")
    threads: int = 1


def character_blocks(path: Path, seq_len: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Blocks of characters as ids: for training, and the last tenth for evaluation."""
    text = path.read_text(encoding="utf-8")
    ids_of = {char: i for i, char in enumerate(sorted(set(text)))}
    ids = torch.tensor([ids_of[char] for char in text])
    blocks = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    cut = len(rows) - len(rows) // 10
    return rows[:cut], rows[cut:], len(ids_of)


def build(arm: dict[str, Any], vocab_size: int, seq_len: int, seed: int) -> Any:
    """The model of an arm; the dense weights it begins with depend on the seed only."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=seq_len,
        n_embd=96,
        n_layer=3,
        n_head=4,
        n_inner=384,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    if "schedule" in arm:
        combine = arm.get("combine", "softmax")
        return to_smoe_dropout(model, EXPERTS, combine, seed, router=arm.get("router", "random"))
    if arm.get("dropout"):
        add_ffn_dropout(model, arm["dropout"])
    return model


@torch.inference_mode()
def bits_per_character(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean over all predicted characters."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        ids = torch.stack([row["input_ids"] for row in rows[start : start + 32]])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
    return total / count / math.log(2)


def run(name: str, seed: int, config: LanguageModellingConfig) -> dict[str, Any]:
    """Train one arm with one seed, and evaluate it."""
    arm = ARMS[name]
    rows, held_out, vocab_size = character_blocks(config.data, config.seq_len)
    model = build(arm, vocab_size, config.seq_len, seed)
    k_end = arm.get("k_end", EXPERTS)
    k_start = k_end if arm.get("schedule") == "constant" else config.k_start
    started = time.perf_counter()
    train(
        model,
        rows,
        (arm["schedule"], k_start, k_end) if "schedule" in arm else None,
        seed=seed,
        steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.steps // 20,
        weight_decay=0.1,
    )
    row = {"arm": name, "seed": seed, "seconds": time.perf_counter() - started}
    row["bpc"] = measure_at(
        model, (EXPERTS // 4, EXPERTS // 2, EXPERTS), lambda: bits_per_character(model, held_out)
    )
    return row | {"steps": config.steps, "batch_size": config.batch_size, "seq_len": config.seq_len}


def main(config: LanguageModellingConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    wanted = ((arm, seed) for seed in config.seeds for arm in config.arms)
    run_missing(config.results, ("arm", "seed"), wanted, lambda arm, seed: run(arm, seed, config))


if __name__ == "__main__":
    main(tyro.cli(LanguageModellingConfig))
