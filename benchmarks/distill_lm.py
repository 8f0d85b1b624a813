"""From a Mixture-of-Experts language model to a dense one a third its size: losses at equal tokens.

    python benchmarks/distill_lm.py --model MODEL --train train.jsonl.gz --held-out valid.jsonl.gz

Every arm of a seed has the same initial student (the teacher's attention, norms and embedding; new FFNs), the
same blocks in the same order and the same number of steps. Measured on held-out text and questions:
perplexity, KL to the teacher, share of equal top-1 tokens, accuracy of generated answers. One JSON line per
arm and seed; lines that are there are not run again. `distill_report.py` makes the table and the figure.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from arms import run_missing
from compress_quality import measure
from moekit.distill import (
    AuxiliaryHeadSpec,
    DistillationRecipe,
    DistillTrainer,
    DualHeadStudent,
    GradientAlignment,
    ModelTeacher,
    StudentInTraining,
)
from moekit.moe import load_documents, split_blocks, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainingArguments

DHKD: dict[str, Any] = {"loss": "binary-kl-norm", "heads": "dual"}
ARMS: dict[str, dict[str, Any] | None] = {
    "labels only": None,
    "KL": {"loss": "kl"},
    "JSD": {"loss": "jsd"},
    "DHKD": DHKD,
    "DHKD, mean": DHKD | {"options": {"center": "mean"}},
    "DHKD, logprob": DHKD | {"options": {"center": "logprob"}},
    "DHKD, mean, a twentieth": DHKD | {"options": {"center": "mean"}, "weight": 100 / 4096 / 20},
    "DHKD, mean, aligned": DHKD | {"options": {"center": "mean"}, "align": True},
    "BinaryKL-Norm, one head": DHKD | {"heads": "single"},
}
"""Recipes, beside the labels' loss of weight 1; DHKD has its published weight, 100 / V, or a
twentieth of it, and a linear second head."""


@dataclass(frozen=True, kw_only=True)
class LmConfig:
    """Distil a language model with each loss."""

    model: str
    """Teacher: path or hub id of a Qwen3-MoE."""
    train: str
    """Text with domains."""
    held_out: str
    """The like, not trained on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    ffn_width: int = 512
    """Of the student's dense FFNs."""
    steps: int = 400
    seq_len: int = 128
    batch_size: int = 16
    learning_rate: float = 2e-3
    eval_tokens: int = 16_384
    questions: int = 100
    results: Path = Path("benchmarks/results/distill_lm.jsonl")
    threads: int = 1


def dense_student(teacher: Any, ffn_width: int, seed: int) -> Any:
    """A dense model around the teacher's attention, norms and embedding."""
    torch.manual_seed(seed)
    known = {key: value for key, value in teacher.config.to_dict().items() if key in SHARED}
    student = Qwen3ForCausalLM(Qwen3Config(**known, intermediate_size=ffn_width))
    own = student.state_dict()
    taken = {
        name: tensor for name, tensor in teacher.state_dict().items() if name in own and ".mlp." not in name
    }
    student.load_state_dict(own | taken)
    student.tie_weights()
    return student


SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHARED += ("head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings")
SHARED += ("bos_token_id", "eos_token_id", "pad_token_id")


def train(student: Any, teacher: Any, arm: dict[str, Any] | None, rows: Any, config: Any, seed: int) -> None:
    """Minimise one arm's loss."""
    settings = dict(arm or {})
    is_aligned = settings.pop("align", False)
    recipe = DistillationRecipe(**settings)
    trained = (
        DualHeadStudent(student, AuxiliaryHeadSpec(kind="linear")) if recipe.heads == "dual" else student
    )
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        seed=seed,
        save_strategy="no",
        logging_steps=100,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    DistillTrainer(
        model=StudentInTraining(trained, recipe, alignment=GradientAlignment() if is_aligned else None),
        args=arguments,
        train_dataset=rows,
        teacher=None if arm is None else ModelTeacher(teacher),
    ).train()


def labelled_rows(documents: Any, tokenizer: Any, config: Any, seed: int) -> list[dict[str, Any]]:
    """The blocks of one training; everything but padding is learned."""
    blocks = token_blocks(
        documents,
        tokenizer,
        seq_len=config.seq_len,
        max_tokens=config.steps * config.batch_size * config.seq_len,
        domain_share="proportional",
        seed=seed,
    )
    labelled = blocks.input_ids.masked_fill(blocks.attention_mask == 0, -100)
    columns = (blocks.input_ids, blocks.attention_mask, labelled)
    keys = ("input_ids", "attention_mask", "labels")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def run(name: str, seed: int, config: LmConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one student."""
    teacher, tokenizer = given["teacher"], given["tokenizer"]
    rows = labelled_rows(given["documents"], tokenizer, config, seed)
    student = dense_student(teacher, config.ffn_width, seed)
    start = time.perf_counter()
    train(student, teacher, ARMS[name], rows, config, seed)
    seconds = time.perf_counter() - start
    student.eval()
    found = measure(teacher, student, tokenizer, given["held_out"], given["asked"], config.questions)
    tokens = sum(int(row["attention_mask"].sum()) for row in rows)
    sizes = {"parameters": student.num_parameters(), "tokens": tokens, "seconds": round(seconds)}
    return {"arm": name, "seed": seed, **found, **sizes}


def main(config: LmConfig) -> None:
    """Run what is missing; the teacher first."""
    torch.set_num_threads(config.threads)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    teacher: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    asked = load_documents(config.held_out)
    blocks = token_blocks(asked, tokenizer, seq_len=256, seed=0)
    _, held_out = split_blocks(blocks, held_out_tokens=config.eval_tokens, seed=0)
    given = {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "documents": load_documents(config.train),
        "held_out": held_out,
        "asked": asked,
    }

    def run_one(name: str, seed: int) -> dict[str, Any]:
        if name != "teacher":
            return run(name, seed, config, given)
        found = measure(teacher, teacher, tokenizer, held_out, asked, config.questions)
        return {"arm": name, "seed": seed, **found, "parameters": teacher.num_parameters()}

    wanted = [("teacher", 0), *((arm, seed) for seed in config.seeds for arm in config.arms)]
    run_missing(config.results, ("arm", "seed"), wanted, partial(run_one))


if __name__ == "__main__":
    main(tyro.cli(LmConfig))
