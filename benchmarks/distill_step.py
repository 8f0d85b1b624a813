"""What a second head costs in a whole step: teacher, student, both heads, forward and backward.

    python benchmarks/distill_step.py

Random weights in the shape of SmolLM2-135M as the teacher (30 layers, width 576, V = 49,152) and of its first
ten layers as the student, one batch of random tokens, one thread. In each round every variant runs once, in
random order; figures are ratios of median CPU times with a 95 % bootstrap interval. Writes
`benchmarks/results/distill_step.json` and the table of `docs/distill.md`.
"""

# R rounds

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from distill_heads import interval, times
from dropout_report import insert_table, markdown
from moekit.distill import (
    AuxiliaryHeadSpec,
    DistillationRecipe,
    DualHeadStudent,
    GradientAlignment,
    ModelTeacher,
    StudentInTraining,
)
from moekit.distill.losses import valid_rows
from transformers import LlamaConfig, LlamaForCausalLM

NAME, BASE = "distill_step", "one head, KL and labels"
SHAPE = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "tie_word_embeddings": True}
DHKD: dict[str, Any] = {"loss": "binary-kl-norm", "heads": "dual"}
VARIANTS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "labels only": ({"loss": "kl"}, "", False),
    BASE: ({"loss": "kl"}, "", False),
    "two heads, rank 200": (DHKD, "bottleneck", False),
    "two heads, rank 200, aligned": (DHKD, "bottleneck", True),
    "two heads, linear": (DHKD, "linear", False),
}
"""Recipe, second head, and whether gradients are aligned."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Time whole steps."""

    layers: int = 10
    teacher_layers: int = 30
    tokens: int = 512
    rounds: int = 5
    """One more comes first and does not count."""
    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/distill.md")


def model(layers: int, seed: int) -> LlamaForCausalLM:
    """Random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers))


def student(name: str, layers: int) -> StudentInTraining:
    """One variant's."""
    recipe, head, is_aligned = VARIANTS[name]
    plain: Any = model(layers, 0)
    if head:
        plain = DualHeadStudent(plain, AuxiliaryHeadSpec(kind=head))
    alignment = GradientAlignment() if is_aligned else None
    return StudentInTraining(plain, DistillationRecipe(**recipe), alignment=alignment).train()


def step(trained: StudentInTraining, teacher: ModelTeacher | None, batch: dict[str, Any]) -> float:
    """CPU seconds."""
    trained.zero_grad()
    start = time.process_time()
    rows = valid_rows(batch["labels"])
    said = None if teacher is None else teacher.says(batch, rows)
    inputs = {"input_ids": batch["input_ids"]}
    trained(inputs, labels=rows.labels, rows=rows, said=said)["loss"].backward()
    return time.process_time() - start


def main(config: StepConfig) -> None:
    """Measure, and write the file and the table."""
    torch.set_num_threads(1)
    teacher = ModelTeacher(model(config.teacher_layers, 1))
    students = {name: student(name, config.layers) for name in VARIANTS}
    ids = torch.randint(SHAPE["vocab_size"], (1, config.tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}

    def run(name: str) -> float:
        return step(students[name], None if name == "labels only" else teacher, batch)

    found = times(VARIANTS, run, config.rounds)
    rows = []
    for name, values in found.items():
        ratio = float(np.median(values) / np.median(found[BASE]))
        rows.append({"variant": name, "seconds": float(np.median(values)), "ratio": ratio})
        rows[-1]["ratio_95"] = interval(values, found[BASE])
        print(rows[-1], flush=True)
    (config.results / f"{NAME}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    body = [
        [
            row["variant"],
            f"{row['seconds']:.2f}",
            "{:.2f} ({:.2f}–{:.2f})".format(row["ratio"], *row["ratio_95"]),
        ]
        for row in rows
    ]
    text = insert_table(
        config.document.read_text(encoding="utf-8"), NAME, markdown(["step", "s", "against one head"], body)
    )
    config.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(StepConfig))
