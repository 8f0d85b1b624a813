"""What RL wins back of what compression has cost: full, compressed, healed, and each of the latter with RL.

    pip install 'moekit[rl]'
    python benchmarks/rl_recovery.py

Policy and task are those of `rl_methods.py`; another set of held-out sums judges every model, with the same
seeds of sampling. Healing is `moekit distill` of the compressed model on task texts of the training prompts
(KL to the original, no labels); RL is GRPO. Everything has three seeds. Appends to
`benchmarks/results/rl_recovery.jsonl`; `rl_report.py` makes the table and the figure of it.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moekit.moe  # noqa: F401  teaches transformers the moekit form
import torch
import tyro
from moekit.rl import ALGORITHMS, PolicySettings, PolicyTrainer
from moekit.rl.rewards import RewardSet, load_reward
from rl_methods import BUNDLED, TASK, TRAIN_SEED, half, task
from transformers import AutoModelForCausalLM, AutoTokenizer

JUDGE_SEED = 2_000_003
FULL, CUT, CUT_RL = "all 16 experts", "8 experts", "8 experts, RL"
HEALED, HEALED_RL = "8 experts, KD", "8 experts, KD, RL"


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Compress, heal and train."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 150
    healing_steps: int = 150
    held_out: int = 100
    results: Path = Path("benchmarks/results/rl_recovery.jsonl")


SETTINGS = PolicySettings(
    steps=1,
    prompts_per_step=16,
    num_generations=8,
    micro_batch_size=64,
    max_completion_length=16,
    stop=("\n",),
    learning_rate=1e-4,
    lr_scheduler="linear",
    eval_generations=8,
    eval_steps=50,
    save_steps=10**6,
)


def train(policy: Path, steps: int, seed: int, held_out: int) -> list[dict[str, Any]]:
    """The history of a training; of one step only the evaluation before it is of use."""
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PolicyTrainer(
            model,
            tokenizer,
            ALGORITHMS["grpo"],
            RewardSet([load_reward("number")]),
            task(tokenizer, 4000, TRAIN_SEED + seed),
            replace(SETTINGS, steps=steps, seed=seed),
            folder=Path(folder),
            eval_prompts=task(tokenizer, held_out, JUDGE_SEED),
        )
        trainer.train()
        return trainer.history.read()


def heal(policy: Path, config: RecoveryConfig, seed: int, folder: Path) -> Path:
    """The compressed model after distillation from the original."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset("chain_sum", size=4000, seed=TRAIN_SEED + seed, **TASK)
    texts = [{"text": f"Q: {row['question']}\nA: {row['answer']}\n"} for row in rows]
    data = folder / f"tasks-{seed}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    out = folder / f"healed-{seed}"
    words = ["--teacher", str(BUNDLED), "--data", str(data), "--loss", "kl", "--label-weight", "0"]
    words += ["--steps", str(config.healing_steps), "--seq-len", "256", "--learning-rate", "3e-4"]
    words += ["--no-compare", "--seed", str(seed), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "moekit.scripts.cli", "distill", str(policy), *words], check=True)
    return out


def main(config: RecoveryConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    there = set()
    if config.results.exists():
        rows = map(json.loads, config.results.read_text(encoding="utf-8").splitlines())
        there = {(row["model"], row["seed"]) for row in rows}

    def measure(name: str, seed: int, policy: Path, steps: int) -> None:
        if (name, seed) in there:
            return
        history = train(policy, steps, seed, config.held_out)
        judged = [row for row in history if "eval_pass@1" in row]
        last = judged[0] if steps == 1 else judged[-1]
        row = {"model": name, "seed": seed, "evaluation": last, "curve": judged}
        with config.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(name, seed, f"{last['eval_pass@1']:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cut = half(folder)
        for seed in config.seeds:
            measure(FULL, seed, BUNDLED, 1)
            measure(CUT, seed, cut, 1)
            measure(CUT_RL, seed, cut, config.steps)
            if {(HEALED, seed), (HEALED_RL, seed)} - there:
                healed = heal(cut, config, seed, folder)
                measure(HEALED, seed, healed, 1)
                measure(HEALED_RL, seed, healed, config.steps)


if __name__ == "__main__":
    main(tyro.cli(RecoveryConfig))
