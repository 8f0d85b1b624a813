r"""All RL methods on one policy, one task and the same number of samples.

    pip install 'moekit[rl]'
    python benchmarks/rl_methods.py --seeds 0 1 2 3 4
    python benchmarks/rl_methods.py --steps 400 --keep-every 4 \
        --results benchmarks/results/rl_methods_long.jsonl \
        --arms GRPO "GRPO, 2 updates" GTPO Clip-Cov KL-Cov ROVER DPH-RL EPO

The policy is the bundled model, compressed by `moekit compress` to half its experts; the task sums of two or
three numbers of one or two digits (reasoning-gym), rewarded 1 for the right number and 0 otherwise. Every arm
has the same prompts in the same order, samples, learning rate and, where its mathematics allows, optimizer
steps; nothing was tuned for an arm. Demonstrations (RL-PLUS) are the right answers. A run that is there
already is not run again. Appends to `benchmarks/results/rl_methods.jsonl`; `rl_report.py` makes tables and
figures of it.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moekit.moe  # noqa: F401  teaches transformers the moekit form
import torch
import tyro
from moekit.rl import ALGORITHMS, PolicySettings, PolicyTrainer, Prompt, make_prompts
from moekit.rl.rewards import RewardSet, load_reward
from transformers import AutoModelForCausalLM, AutoTokenizer

BUNDLED = Path(__file__).resolve().parents[1] / "scripts" / "bundled"
TASK = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
TRAIN_SEED, HELD_OUT_SEED = 1, 1_000_001
KEPT = ("step", "reward", "entropy", "entropy_covariance", "completions/mean_length", "skipped_steps")
ON_POLICY = {"mini_batches": 1}
TWO_UPDATES = {"mini_batches": 2}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method as it is run here."""

    algorithm: str
    updates: dict[str, int]
    """Of each rollout."""
    settings: dict[str, Any]
    """Of the method; its own defaults by default."""


def _arm(algorithm: str, updates: dict[str, int] = ON_POLICY, **settings: Any) -> Arm:
    return Arm(algorithm=algorithm, updates=updates, settings=settings)


ARMS = {
    "GRPO": _arm("grpo"),
    "GRPO, 2 updates": _arm("grpo", TWO_UPDATES),
    "REINFORCE": _arm("reinforce"),
    "RLOO": _arm("rloo"),
    "Dr. GRPO": _arm("dr-grpo"),
    "DAPO": _arm("dapo"),
    "GSPO": _arm("gspo", TWO_UPDATES),
    "GTPO": _arm("gtpo"),
    # The published shares are of batches of a million tokens, and would be one token here.
    "Clip-Cov": _arm("clip-cov", TWO_UPDATES, share=0.02),
    "KL-Cov": _arm("kl-cov", TWO_UPDATES, share=0.02),
    "RL-PLUS": _arm("rl-plus"),
    "HBPO": _arm("hbpo", budget_prefix=" {budget}:"),
    "ROVER": _arm("rover", TWO_UPDATES),
    "DPH-RL": _arm("dph-rl"),
    "EPO": _arm("epo"),
}


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """Train the policy with every method."""

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    prompts: int = 8
    group: int = 8
    held_out: int = 96
    learning_rate: float = 1e-4
    keep_every: int = 1
    """Steps between rows of the history that are written; those with an evaluation always are."""
    policy: Path | None = None
    """A policy that is there already; by default it is made."""
    results: Path = Path("benchmarks/results/rl_methods.jsonl")


def half(folder: Path) -> Path:
    """The bundled model with half its experts."""
    out = folder / "half"
    words = ["--experts", "8", "--data", str(BUNDLED / "sample.jsonl"), "--seq-len", "256"]
    words += ["--calibration-tokens", "32768", "--no-report", "--out", str(out)]
    command = [sys.executable, "-m", "moekit.scripts.cli", "compress", str(BUNDLED), *words]
    subprocess.run(command, check=True)
    return out


def task(tokenizer: Any, size: int, seed: int) -> list[Prompt]:
    """Prompts of sums, with answers and demonstrations."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **TASK)
    return make_prompts(
        [
            {"prompt": f"Q: {r['question']}\nA:", "answer": r["answer"], "demonstration": f" {r['answer']}\n"}
            for r in rows
        ],
        tokenizer,
    )


def settings_of(config: MethodsConfig, arm: Arm, seed: int) -> PolicySettings:
    """The same for all arms, but for the number of updates."""
    extra = dict(ALGORITHMS[arm.algorithm].trainer_defaults)
    terms = {name: extra[name] for name in ("beta", "entropy_coef") if name in extra}
    return PolicySettings(
        **{
            "steps": config.steps,
            "prompts_per_step": config.prompts,
            "num_generations": config.group,
            "micro_batch_size": 64,
            "max_completion_length": 16,
            "stop": ("\n",),
            "learning_rate": config.learning_rate,
            "eval_steps": 20,
            "eval_generations": 16,
            "save_steps": 10**6,
            "seed": seed,
            **arm.updates,
            **terms,
        }
    )


def slim(row: dict[str, Any]) -> dict[str, Any]:
    """What the report reads of a step."""
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in row.items()
        if name in KEPT or name.startswith("eval_")
    }


def run(config: MethodsConfig, policy: Path, name: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed."""
    arm = ARMS[name]
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PolicyTrainer(
            model,
            tokenizer,
            ALGORITHMS[arm.algorithm].with_settings(**arm.settings),
            RewardSet([load_reward("number")]),
            task(tokenizer, 2000, TRAIN_SEED),
            settings_of(config, arm, seed),
            folder=Path(folder),
            eval_prompts=task(tokenizer, config.held_out, HELD_OUT_SEED),
        )
        trainer.train()
        history = [
            slim(row)
            for row in trainer.history.read()
            if row["step"] % config.keep_every == 0 or "eval_pass@1" in row
        ]
    return {"arm": name, "seed": seed, "seconds": time.perf_counter() - begin, "history": history}


def main(config: MethodsConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    there = set()
    if config.results.exists():
        rows = map(json.loads, config.results.read_text(encoding="utf-8").splitlines())
        there = {(row["arm"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        policy = half(Path(folder)) if config.policy is None else config.policy
        for seed in config.seeds:
            for name in config.arms:
                if (name, seed) in there:
                    continue
                row = run(config, policy, name, seed)
                with config.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                passed = [r["eval_pass@1"] for r in row["history"] if "eval_pass@1" in r]
                print(name, seed, f"{passed[0]:.3f} -> {passed[-1]:.3f}, {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(MethodsConfig))
