"""What healing gives back: a model with half of its experts, distilled from itself as it was.

    python benchmarks/distill_heal.py --model MODEL --train train.jsonl.gz --held-out valid.jsonl.gz

M-SMoE merges the experts; then the routers alone are trained on what the original says (Router KD), or
everything is, with or without the labels' loss, on the same blocks in the same number of steps. A seed
chooses the calibration blocks and the order of the training. Measured as in `distill_lm.py`. One JSON line
per number of experts, arm and seed; lines that are there are not run again. `distill_lm_report.py` makes the
table.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arms import run_missing
from compress_quality import QualityConfig, calibrate, measure
from distill_lm import labelled_rows, train
from moekit.compress import METHODS, apply_plan
from moekit.distill import train_only_routers
from moekit.moe import expert_layers, load_documents, split_blocks, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

TEACHER_ALONE = {"loss": "kl", "label_weight": 0.0}
ARMS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "merged": (None, False),
    "routers": (TEACHER_ALONE, True),
    "everything": (TEACHER_ALONE, False),
    "everything, with labels": ({"loss": "kl"}, False),
}
"""Recipe (none: nothing is trained), and whether routers alone are."""


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """Merge experts and heal."""

    model: str
    """Path or hub id of an SMoE."""
    train: str
    """Text with domains."""
    held_out: str
    """The like, not trained on."""
    experts: tuple[int, ...] = (8,)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    seq_len: int = 128
    batch_size: int = 16
    learning_rate: float = 5e-4
    eval_tokens: int = 16_384
    questions: int = 100
    results: Path = Path("benchmarks/results/distill_heal.jsonl")
    threads: int = 1


def main(config: HealConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    tokenizer = AutoTokenizer.from_pretrained(config.model)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()

    original, documents = load(), load_documents(config.train)
    asked = load_documents(config.held_out)
    blocks = token_blocks(asked, tokenizer, seq_len=256, seed=0)
    pool, held_out = split_blocks(blocks, held_out_tokens=config.eval_tokens, seed=0)
    quality = QualityConfig(model=config.model, data=config.held_out, name="")

    def run(experts: int, arm: str, seed: int) -> dict[str, Any]:
        model = load()
        plan = METHODS["m-smoe"](expert_layers(model), calibrate(model, pool, quality, seed), experts=experts)
        apply_plan(model, plan)
        recipe, is_routers = ARMS[arm]
        if recipe is not None:
            if is_routers:
                train_only_routers(model)
            train(model, original, recipe, labelled_rows(documents, tokenizer, config, seed), config, seed)
        found = measure(original, model.eval(), tokenizer, held_out, asked, config.questions)
        return {"experts": experts, "arm": arm, "seed": seed, **found}

    wanted = ((e, arm, seed) for seed in config.seeds for e in config.experts for arm in ARMS)
    run_missing(config.results, ("experts", "arm", "seed"), wanted, run)


if __name__ == "__main__":
    main(tyro.cli(HealConfig))
