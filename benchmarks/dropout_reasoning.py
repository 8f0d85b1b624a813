"""Arithmetic word problems: a small encoder fine-tuned dense, dense with dropout, and with SMoE-Dropout.

    python benchmarks/dropout_reasoning.py --model sentence-transformers/all-MiniLM-L6-v2 --data SETS

The encoder reads a problem of ASDiv-A, MAWPS or SVAMP and says which of + - * / solves it. **This is not the
paper's task.** There a decoder writes the whole equation, operands and their order included; an encoder of
this size has none, and a few thousand problems do not train one. So the accuracies here can be compared with
each other and with no published figure. Problems of more than one operation are dropped.

Seed s of ASDiv-A and MAWPS is fold s of their cross-validation, in training and in test. SVAMP is a test set
only: its models learn from MAWPS and ASDiv-A together, and their seeds differ in all that is random. Every
arm starts from the same pretrained weights and the same new head (of its seed), sees the same problems in the
same order for the same number of steps, at one learning rate that was tuned for none. The encoder's own
dropout is off in all arms, so that each has the regularisation it is named after and no other, and its word
embeddings stay as they are, to save time. One JSON line per set, arm and seed is appended, and what is there
is not run again.
"""

import csv
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from arms import EXPERTS, measure_at, run_missing, train
from moekit.moe import add_ffn_dropout, to_smoe_dropout
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)

OPERATIONS = ("+", "-", "*", "/")
SETS = {"ASDiv-A": "cv_asdiv-a/fold{seed}", "MAWPS": "cv_mawps/fold{seed}", "SVAMP": "mawps-asdiv-a_svamp"}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense + dropout": {"dropout": 0.1},
    "SMoE-Dropout, uniform": {"combine": "uniform"},
    "SMoE-Dropout, softmax": {"combine": "softmax"},
}


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    """Fine-tune every arm on every set, and evaluate it at several K."""

    model: str
    """A pretrained encoder: a path or a hub id."""
    data: Path
    """Folder with cv_asdiv-a, cv_mawps and mawps-asdiv-a_svamp, as the authors of SVAMP publish them."""
    seeds: tuple[Literal[0, 1, 2, 3, 4], ...] = (0, 1, 2)
    sets: tuple[str, ...] = tuple(SETS)
    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 3e-4
    k_start: int = EXPERTS // 2
    results: Path = Path("benchmarks/results/dropout_reasoning.jsonl")
    threads: int = 1


def read_problems(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The problems of one operation, whose label is the place of it in `OPERATIONS`."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["Question"], row["Equation"].split()) for row in csv.DictReader(file)]
    return [
        {**tokenizer(question, truncation=True, max_length=128), "labels": OPERATIONS.index(equation[0])}
        for question, equation in rows
        if len(equation) == 3  # operator and two operands, in prefix notation
    ]


def build(arm: dict[str, Any], config: ReasoningConfig, seed: int) -> Any:
    """The encoder of an arm with a new head, which depends on the seed only."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        num_labels=len(OPERATIONS),
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if "combine" in arm:
        to_smoe_dropout(model, EXPERTS, arm["combine"], seed, partition="random")
    elif "dropout" in arm:
        add_ffn_dropout(model, arm["dropout"])
    return model


@torch.inference_mode()
def accuracy(model: Any, rows: list[dict[str, Any]], collator: Any) -> float:
    """Share of problems whose operation is found."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # less padding
    right = 0
    for start in range(0, len(rows), 32):
        batch = collator(rows[start : start + 32])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def run(config: ReasoningConfig, name: str, arm: str, seed: int) -> dict[str, Any]:
    """Fine-tune one arm on one set with one seed, and evaluate it."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    folder = config.data / SETS[name].format(seed=seed)
    problems, test = (read_problems(folder / f"{part}.csv", tokenizer) for part in ("train", "dev"))
    collator = DataCollatorWithPadding(tokenizer)
    model = build(ARMS[arm], config, seed)
    model.get_input_embeddings().requires_grad_(False)
    settings = {
        "steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
    }
    started = time.perf_counter()
    train(
        model,
        problems,
        ("linear", config.k_start, EXPERTS),
        seed=seed,
        collator=collator,
        lr_scheduler_type="linear",
        warmup_steps=config.steps // 10,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        **settings,
    )
    seconds = time.perf_counter() - started
    commonest = Counter(problem["labels"] for problem in problems).most_common(1)[0][0]
    return {
        "set": name,
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "accuracy": measure_at(
            model, (EXPERTS // 4, EXPERTS // 2, EXPERTS), lambda: accuracy(model, test, collator)
        ),
        "majority": sum(problem["labels"] == commonest for problem in test) / len(test),
        "train_problems": len(problems),
        "test_problems": len(test),
        **settings,
    }


def main(config: ReasoningConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    wanted = ((name, arm, seed) for seed, name, arm in product(config.seeds, config.sets, config.arms))
    run_missing(config.results, ("set", "arm", "seed"), wanted, partial(run, config))


if __name__ == "__main__":
    main(tyro.cli(ReasoningConfig))
