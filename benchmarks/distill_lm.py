"""From a Mixture-of-Experts language model to a dense one a third its size: losses at equal tokens.

    python benchmarks/distill_lm.py --model MODEL --train train.jsonl.gz --held-out valid.jsonl.gz

Every arm of a seed has the same initial student (the teacher's attention, norms and embedding; new FFNs), the
same blocks in the same order and the same number of steps. Measured on held-out text and questions:
perplexity, KL to the teacher, share of equal top-1 tokens, accuracy of generated answers. One JSON line per
arm and seed; lines that are there are not run again, and `--arms` and `--seeds` choose some of the others:

    python benchmarks/distill_lm.py ... --arms "DHKD, mean" --seeds 0

`distill_lm_report.py` makes the table and the figure.
"""

import time
from collections.abc import Iterable
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
}
"""Recipes, beside the labels' loss of weight 1; DHKD has its published weight, 100 / V, or a
twentieth of it, and a linear second head."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What a teacher, its texts and a training of some steps are, here and in `distill_heal.py`."""

    model: str
    """Teacher: path or hub id of a Qwen3-MoE."""
    train: str
    """Text with domains."""
    held_out: str
    """The like, not trained on."""
    steps: int
    learning_rate: float
    results: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    seq_len: int = 128
    batch_size: int = 16
    eval_tokens: int = 16_384
    questions: int = 100
    threads: int = 1

    def check_arms(self, known: Iterable[str]) -> None:
        """Look before work starts.

        Raises:
            ValueError: An arm that is not among these.
        """
        if unknown := [name for name in self.arms if name not in known]:
            raise ValueError(f"arms {unknown} are not among {list(known)}")


@dataclass(frozen=True, kw_only=True)
class LmConfig(TextConfig):
    """Distil a language model with each loss."""

    arms: tuple[str, ...] = tuple(ARMS)
    ffn_width: int = 512
    """Of the student's dense FFNs."""
    steps: int = 400
    learning_rate: float = 2e-3
    results: Path = Path("benchmarks/results/distill_lm.jsonl")


class Texts:
    """What students learn from and are judged on."""

    def __init__(self, config: TextConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.documents = load_documents(config.train)
        self.asked = load_documents(config.held_out)
        blocks = token_blocks(self.asked, tokenizer, seq_len=256, seed=0)
        self.pool, self.held_out = split_blocks(blocks, held_out_tokens=config.eval_tokens, seed=0)

    def rows(self, seed: int) -> list[dict[str, Any]]:
        """The blocks of one training; everything but padding is learned."""
        config = self.config
        blocks = token_blocks(
            self.documents,
            self.tokenizer,
            seq_len=config.seq_len,
            max_tokens=config.steps * config.batch_size * config.seq_len,
            domain_share="proportional",
            seed=seed,
        )
        labelled = blocks.input_ids.masked_fill(blocks.attention_mask == 0, -100)
        columns = (blocks.input_ids, blocks.attention_mask, labelled)
        keys = ("input_ids", "attention_mask", "labels")
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]

    def measure(self, teacher: Any, student: Any) -> dict[str, Any]:
        """All figures of a student."""
        questions = self.config.questions
        return measure(teacher, student.eval(), self.tokenizer, self.held_out, self.asked, questions)


def load(model: str) -> Any:
    """In float32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


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


def train(
    student: Any, teacher: Any, arm: dict[str, Any] | None, rows: Any, config: TextConfig, seed: int
) -> None:
    """Minimise one arm's loss."""
    recipe = DistillationRecipe(**(arm or {}))
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
        model=StudentInTraining(trained, recipe),
        args=arguments,
        train_dataset=rows,
        teacher=None if arm is None else ModelTeacher(teacher),
    ).train()


def run(name: str, seed: int, *, config: LmConfig, teacher: Any, texts: Texts) -> dict[str, Any]:
    """Train and measure one student, or measure the teacher."""
    if name == "teacher":
        found = texts.measure(teacher, teacher)
        return {"arm": name, "seed": seed, **found, "parameters": teacher.num_parameters()}
    rows = texts.rows(seed)
    student = dense_student(teacher, config.ffn_width, seed)
    start = time.perf_counter()
    train(student, teacher, ARMS[name], rows, config, seed)
    seconds = time.perf_counter() - start
    tokens = sum(int(row["attention_mask"].sum()) for row in rows)
    sizes = {"parameters": student.num_parameters(), "tokens": tokens, "seconds": round(seconds)}
    return {"arm": name, "seed": seed, **texts.measure(teacher, student), **sizes}


def main(config: LmConfig) -> None:
    """Run what is missing; the teacher first."""
    config.check_arms(ARMS)
    torch.set_num_threads(config.threads)
    texts = Texts(config, AutoTokenizer.from_pretrained(config.model))
    wanted = [("teacher", 0), *((arm, seed) for seed in config.seeds for arm in config.arms)]
    ask = partial(run, config=config, teacher=load(config.model), texts=texts)
    run_missing(config.results, ("arm", "seed"), wanted, ask)


if __name__ == "__main__":
    main(tyro.cli(LmConfig))
