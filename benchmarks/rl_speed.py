"""Steps of moekit's RL trainer beside TRL's GRPOTrainer, in one run on the CPU.

    pip install trl
    python benchmarks/rl_speed.py

The same tiny random Qwen3-MoE, the bundled tokenizer, prompts, group size, completion length, learning rate
and loss (GRPO, one update of each rollout); one thread each. Both sides run in processes of their own, in
turns; the first steps of each do not count. Time is that of the CPU, so that other programs on the machine
count little. A random model hardly ever ends by itself, so nearly all completions have the full length on
both sides. Short prompts ask for a sum; long ones have examples before it, and shorter completions. Writes
`benchmarks/results/rl_speed.json` and the table of `docs/rl.md`.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from dropout_report import insert_table, markdown
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

NAME = "rl_speed"
SHAPES = {"short prompts": (0, 64), "long prompts": (16, 32)}
"""Examples before the question, and tokens of a completion."""
SIDES = ("TRL", "moekit")
VOCAB = 2048
WARM_UP = 2
"""Steps that do not count."""
TOKENIZER = Path(__file__).resolve().parents[1] / "scripts" / "bundled"


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Measure steps of GRPO of two libraries."""

    steps: int = 10
    """That count, of each process."""
    rounds: int = 5
    """Processes of each side, in turns."""
    prompts: int = 2
    group: int = 8
    shape: str = "short prompts"
    """Of the process that measures: see `SHAPES`."""
    side: str | None = None
    """Measure this one in this process and print it; the program calls itself so."""
    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/rl.md")


def tiny_config(**tokens: int | None) -> Qwen3MoeConfig:
    """Of a Mixture of Experts of 2.3 million parameters.

    Args:
        tokens: Ids of special ones.
    """
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        **tokens,
    )


def build(num_examples: int) -> tuple[Any, Any, list[dict[str, str]]]:
    """Model, tokenizer and prompts of both sides."""
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    config = tiny_config(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    numbers = np.random.default_rng(0).integers(10, 100, size=(256, 2)).tolist()
    shown = "".join(f"Q: Compute {a} + {b}.\nA: {a + b}\n" for a, b in numbers[:num_examples])
    rows = [{"prompt": f"{shown}Q: Compute {a} + {b}.\nA:", "answer": str(a + b)} for a, b in numbers]
    return Qwen3MoeForCausalLM(config), tokenizer, rows


def share_of_digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between random completions."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def trl_arguments(config: SpeedConfig, folder: str, length: int) -> Any:
    """What TRL is told, as much as it can be what moekit does."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=1e-4,
        per_device_train_batch_size=config.prompts * config.group,
        num_generations=config.group,
        max_completion_length=length,
        max_steps=config.steps + WARM_UP,
        loss_type="grpo",
        beta=0.0,
        router_aux_loss_coef=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )


def run_trl(config: SpeedConfig) -> dict[str, Any]:
    """Seconds of each step, and of its stages."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    num_examples, length = SHAPES[config.shape]
    model, tokenizer, rows = build(num_examples)
    stages = {"rollouts": 0.0, "updates": 0.0}

    class Clock(TrainerCallback):
        """Notes when steps end."""

        times: list[float]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.process_time())

    class Timed(GRPOTrainer):
        """Adds up the time of the rollouts."""

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            found = super()._generate_and_score_completions(*args, **kwargs)
            stages["rollouts"] += time.process_time() - begin
            return found

    clock = Clock()
    clock.times = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model,
            reward_funcs=share_of_digits,
            args=trl_arguments(config, folder, length),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    seconds = np.diff(clock.times)[WARM_UP - 1 :]
    return {
        "seconds": seconds.tolist(),
        "rollout_share": stages["rollouts"] / (clock.times[-1] - clock.times[0]),
    }


def run_moekit(config: SpeedConfig) -> dict[str, Any]:
    """Seconds of each step, and of its stages."""
    from moekit.rl import ALGORITHMS, PolicySettings, PolicyTrainer, make_prompts, stopwatch
    from moekit.rl.rewards import NamedReward, RewardSet

    num_examples, length = SHAPES[config.shape]
    model, tokenizer, rows = build(num_examples)
    settings = PolicySettings(
        steps=config.steps + WARM_UP,
        prompts_per_step=config.prompts,
        num_generations=config.group,
        micro_batch_size=config.prompts * config.group,
        max_completion_length=length,
        learning_rate=1e-4,
        save_steps=10**6,
    )
    stopwatch.time.perf_counter = time.process_time  # in this process alone
    with tempfile.TemporaryDirectory() as folder:
        trainer = PolicyTrainer(
            model,
            tokenizer,
            ALGORITHMS["grpo"],
            RewardSet([NamedReward(name="digits", function=share_of_digits)]),
            make_prompts(rows, tokenizer),
            settings,
            folder=Path(folder),
        )
        trainer.train()
        history = trainer.history.read()[WARM_UP:]
    stages = [name for name in history[0] if name.startswith("time/")]
    totals = {name: sum(row[name] for row in history) for name in stages}
    seconds = [sum(row[name] for name in stages) for row in history]
    return {"seconds": seconds, "rollout_share": totals["time/rollouts"] / sum(totals.values())}


def measure(config: SpeedConfig, side: str, shape: str) -> dict[str, Any]:
    """One process."""
    words = [f"--{name}={getattr(config, name)}" for name in ("steps", "prompts", "group")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--shape", shape, *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def summarise(rows: list[dict[str, Any]], config: SpeedConfig) -> list[dict[str, Any]]:
    """A row for each shape and side; the interval of the ratio is over rounds."""
    return [row for shape in SHAPES for row in _compare([r for r in rows if r["shape"] == shape], config)]


def _compare(rows: list[dict[str, Any]], config: SpeedConfig) -> list[dict[str, Any]]:
    medians = {side: np.array([np.median(r["seconds"]) for r in rows if r["side"] == side]) for side in SIDES}
    generator = np.random.default_rng(0)
    found = []
    for side in SIDES:
        picks = generator.integers(len(medians[side]), size=(2000, len(medians[side])))
        ratios = np.median(medians["TRL"][picks], axis=1) / np.median(medians[side][picks], axis=1)
        seconds = float(np.median(medians[side]))
        mine = [row for row in rows if row["side"] == side]
        found.append(
            {
                "shape": rows[0]["shape"],
                "side": side,
                "seconds": seconds,
                "samples_per_second": config.prompts * config.group / seconds,
                "speed_to_trl": float(np.median(medians["TRL"]) / seconds),
                "speed_to_trl_95": np.quantile(ratios, [0.025, 0.975]).tolist(),
                "rollout_share": float(np.mean([row["rollout_share"] for row in mine])),
                "megabytes": float(np.median([row["megabytes"] for row in mine])),
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each shape and side."""
    body = [
        [
            row["shape"],
            row["side"],
            f"{row['seconds']:.3f}",
            f"{row['samples_per_second']:.1f}",
            f"{row['speed_to_trl']:.2f} ({row['speed_to_trl_95'][0]:.2f}–{row['speed_to_trl_95'][1]:.2f})",
            f"{row['rollout_share']:.0%}",
            f"{row['megabytes']:.0f}",
        ]
        for row in rows
    ]
    names = ["prompts", "GRPO by", "step, CPU s", "samples/s", "speed / TRL", "in rollouts", "peak, MB"]
    return markdown(names, body)


def main(config: SpeedConfig) -> None:
    """Measure, write the file and the table."""
    torch.set_num_threads(1)
    if config.side is not None:
        found = {"TRL": run_trl, "moekit": run_moekit}[config.side](config)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(json.dumps({"shape": config.shape, "side": config.side, **found, "megabytes": peak}))
        return
    try:
        versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install trl") from error
    rows = []
    for _ in range(config.rounds):
        for shape, side in itertools.product(SHAPES, SIDES):
            rows.append(measure(config, side, shape))
            print(shape, side, f"{np.median(rows[-1]['seconds']):.3f} s", flush=True)
    summary = summarise(rows, config)
    text = json.dumps({"versions": versions, "summary": summary, "rows": rows}, indent=1) + "\n"
    (config.results / f"{NAME}.json").write_text(text, encoding="utf-8")
    document = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(document, NAME, table(summary)), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
