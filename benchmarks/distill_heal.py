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
from compress_quality import QualityConfig, calibrate
from distill_lm import TextConfig, Texts, load, train
from moekit.compress import METHODS, apply_plan
from moekit.distill import train_only_routers
from moekit.moe import expert_layers
from transformers import AutoTokenizer

TEACHER_ALONE = {"loss": "kl", "label_weight": 0.0}
ARMS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "merged": (None, False),
    "routers": (TEACHER_ALONE, True),
    "everything": (TEACHER_ALONE, False),
    "everything, with labels": ({"loss": "kl"}, False),
}
"""Recipe (none: nothing is trained), and whether routers alone are."""


@dataclass(frozen=True, kw_only=True)
class HealConfig(TextConfig):
    """Merge experts and heal."""

    experts: tuple[int, ...] = (8,)
    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = 100
    learning_rate: float = 5e-4
    results: Path = Path("benchmarks/results/distill_heal.jsonl")


def main(config: HealConfig) -> None:
    """Run what is missing."""
    config.check_arms(ARMS)
    torch.set_num_threads(config.threads)
    texts = Texts(config, AutoTokenizer.from_pretrained(config.model))
    original = load(config.model)
    quality = QualityConfig(model=config.model, data=config.held_out, name="")

    def run(experts: int, arm: str, seed: int) -> dict[str, Any]:
        model = load(config.model)
        statistics = calibrate(model, texts.pool, quality, seed)
        plan = METHODS["m-smoe"](expert_layers(model), statistics, experts=experts)
        apply_plan(model, plan)
        recipe, is_routers = ARMS[arm]
        if recipe is not None:
            if is_routers:
                train_only_routers(model)
            train(model, original, recipe, texts.rows(seed), config, seed)
        return {"experts": experts, "arm": arm, "seed": seed, **texts.measure(original, model)}

    wanted = ((e, arm, seed) for seed in config.seeds for e in config.experts for arm in config.arms)
    run_missing(config.results, ("experts", "arm", "seed"), wanted, run)


if __name__ == "__main__":
    main(tyro.cli(HealConfig))
