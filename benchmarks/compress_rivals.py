"""Every method of compression on the same models, calibration tokens and numbers of experts, and healed.

    python benchmarks/compress_rivals.py --model MODEL --name NAME --data valid.jsonl.gz --train train.gz
    python benchmarks/rivals_report.py

Methods have the defaults of their papers, which are those of `moekit compress`; nothing is tuned for one of
them. A seed chooses the calibration blocks (and random scores); held-out blocks and questions are the same
for all. Stages: one-shot; the routers alone healed (KL); all weights healed (labels and 0.2 KL) with the
same number of tokens, steps and learning rate. Appends to `benchmarks/results/compress_rivals.jsonl`; rows
that are there are not run again.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from compress_quality import accuracies
from moekit.compress import METHODS, apply_plan, compare_models, generate_completions, loop_share
from moekit.compress.budget import sensitivity_counts
from moekit.compress.methods import NEEDS_SAMPLES
from moekit.distill import DistillTrainer, StudentInTraining, train_only_routers
from moekit.distill.teachers import ModelTeacher
from moekit.moe import expert_layers, load_documents, split_blocks, token_blocks
from moekit.moe.footprint import footprint
from moekit.moe.samples import InputSamples
from moekit.moe.statistics import RoutingStatistics
from moekit.scripts.calibrate import record
from moekit.scripts.heal import RECIPES
from moekit.scripts.sensitivity import layer_sensitivities
from moekit.scripts.sequential import compress_in_sequence
from moekit.scripts.train_data import BlockRows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

ARMS: dict[str, dict[str, Any]] = {
    "M-SMoE": {"method": "m-smoe"},
    "M-SMoE, uniform": {"method": "m-smoe", "grouping": "uniform"},
    "HC-SMoE": {"method": "hc-smoe"},
    "HC-SMoE, by sensitivity": {"method": "hc-smoe", "grouping": "sensitivity"},
    "REAM": {"method": "ream", "sequential": True},
    "REAP": {"method": "reap"},
    "REAP, sequential": {"method": "reap", "sequential": True},
    "REAP, by sensitivity": {"method": "reap", "grouping": "sensitivity"},
    "M-SMoE, by sensitivity": {"method": "m-smoe", "grouping": "sensitivity"},
    "EAN": {"method": "ean"},
    "EAN, by sensitivity": {"method": "ean", "grouping": "sensitivity"},
    "MoNE": {"method": "mone"},
    "MoNE, by sensitivity": {"method": "mone", "grouping": "sensitivity"},
    "EAN and constants": {"method": "ean", "router": "constant"},
    "EAN and constants, by sensitivity": {"method": "ean", "router": "constant", "grouping": "sensitivity"},
    "REAP and constants": {"method": "reap", "router": "constant"},
    "REAP and constants, by sensitivity": {"method": "reap", "router": "constant", "grouping": "sensitivity"},
    "frequency": {"method": "frequency"},
    "routing weight": {"method": "routing-weight"},
    "MAN": {"method": "man"},
    "AIMER": {"method": "aimer"},
    "random": {"method": "random"},
}
HEALED = (
    "M-SMoE",
    "HC-SMoE",
    "HC-SMoE, by sensitivity",
    "REAM",
    "REAP",
    "REAP, by sensitivity",
    "M-SMoE, by sensitivity",
    "EAN",
    "EAN, by sensitivity",
    "frequency",
    "routing weight",
    "MAN",
    "AIMER",
    "random",
    "MoNE",
    "EAN and constants, by sensitivity",
    "REAP and constants, by sensitivity",
)
STAGES = ("one-shot", "router", "kd")
LOOPS = 32
"""Prompts whose completions are looked at for loops."""


@dataclass(frozen=True, kw_only=True)
class RivalsConfig:
    """Compare all methods on one model."""

    model: str
    """Path or hub id of an SMoE."""
    data: str
    """Held-out text with domains; calibration and evaluation blocks are cut from it and never shared."""
    train: str
    """Text to heal on."""
    name: str
    """Of the model, in the results."""
    experts: tuple[int, ...] = (12, 8, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    healed_experts: tuple[int, ...] = (12, 8, 4)
    seq_len: int = 256
    calibration_tokens: int = 32_768
    eval_tokens: int = 16_384
    questions: int = 100
    heal_steps: int = 64
    heal_batch: int = 8
    learning_rate: float = 3e-4
    stages: tuple[str, ...] = STAGES
    results: Path = Path("benchmarks/results/compress_rivals.jsonl")
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods share."""

    config: RivalsConfig
    original: Any
    tokenizer: Any
    pool: Any
    held_out: Any
    documents: list[Any]
    prompts: list[str]
    healing_rows: Any

    def calibration_blocks(self, seed: int) -> Any:
        """The blocks that a seed chooses."""
        order = np.random.default_rng(seed).permutation(len(self.pool))
        return self.pool.select(order[: self.config.calibration_tokens // self.config.seq_len].tolist())

    def measure(self, model: Any) -> dict[str, Any]:
        """All figures of one model against the original."""
        overall = (found := compare_models(self.original, model, self.held_out, batch_size=8)).overall
        texts = generate_completions(model, self.tokenizer, self.prompts, max_new_tokens=64)
        return {
            "kl": overall.kl.value,
            "perplexity": overall.perplexity_compressed.value,
            "top1_agreement": overall.top1_agreement.value,
            "perplexity_by_domain": {d.domain: d.perplexity_compressed.value for d in found.domains},
            "accuracy": accuracies(model, self.tokenizer, self.documents, self.config.questions),
            "loop_share": loop_share(texts),
            "bytes": footprint(model, expert_layers(model)).total_bytes,
        }


def read(config: RivalsConfig) -> Setting:
    """Load everything."""
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model)
    original = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    documents = load_documents(config.data)
    blocks = token_blocks(documents, tokenizer, seq_len=config.seq_len, seed=0)
    pool, held_out = split_blocks(blocks, held_out_tokens=config.eval_tokens, seed=0)
    tokens = config.heal_steps * config.heal_batch * config.seq_len
    training = token_blocks(
        load_documents(config.train), tokenizer, seq_len=config.seq_len, max_tokens=tokens, seed=0
    )
    starts = [ids[:16].tolist() for ids in held_out.input_ids[:LOOPS]]
    return Setting(
        config=config,
        original=original,
        tokenizer=tokenizer,
        pool=pool,
        held_out=held_out,
        documents=[document for document in documents if document.domain == "tasks"],
        prompts=[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in starts],
        healing_rows=BlockRows(training),
    )


def compress(
    setting: Setting, arm: str, experts: int, seed: int, known: tuple[RoutingStatistics, InputSamples]
) -> Any:
    """A compressed copy of the original."""
    options = dict(ARMS[arm])
    model, method = copy.deepcopy(setting.original), options.pop("method")
    layers, blocks = expert_layers(model), setting.calibration_blocks(seed)
    needs_samples = method in NEEDS_SAMPLES
    planner: Callable[..., Any] = partial(METHODS[method], experts=experts, seed=seed)
    if options.pop("sequential", False):

        def plan_layers(part: Any, statistics: Any, samples: Any) -> Any:
            return planner(part, statistics, **({"samples": samples} if needs_samples else {}))

        compress_in_sequence(
            model, layers, blocks, plan_layers, batch_size=8, sample_inputs=needs_samples, progress=False
        )
        return model
    statistics, samples = known
    given = {"samples": samples} if needs_samples else {}
    if options.get("grouping") == "sensitivity":

        def alone(part: Any, kept: int) -> Any:
            own = {layer.name: statistics.layers[layer.name] for layer in part}
            return planner(part, RoutingStatistics(layers=own), experts=kept, grouping="uniform", **given)

        counts = sensitivity_counts(layers, experts=experts)
        options["sensitivities"] = layer_sensitivities(
            model, layers, blocks, counts, alone, batch_size=8, statistics=statistics, samples=samples
        )
    plan = planner(layers, statistics, **options, **given)
    apply_plan(model, plan, statistics=statistics, samples=samples)
    return model


def heal(
    model: Any,
    original: Any,
    rows: Any,
    stage: str,
    *,
    steps: int,
    seed: int,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    callbacks: Sequence[Any] = (),
) -> None:
    """Train in place."""
    model.requires_grad_(True)  # it is a copy of the original, which as a teacher is frozen
    if stage == "router":
        train_only_routers(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="no",
            report_to="none",
            seed=seed,
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=10**6,
        )
        trainer: Any = DistillTrainer(
            model=StudentInTraining(model.train(), RECIPES[stage]),
            args=arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            teacher=ModelTeacher(original),
            callbacks=list(callbacks),
        )
        trainer.train()
    model.eval()


def main(config: RivalsConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    lines = config.results.read_text(encoding="utf-8").splitlines() if config.results.exists() else []
    names = ("model", "arm", "experts", "seed", "stage")
    done = {tuple(row[name] for name in names) for row in map(json.loads, lines)}
    setting = read(config)

    def keep(key: tuple[Any, ...], begin: float, model: Any) -> None:
        seconds = time.process_time() - begin
        row = dict(zip(names, key, strict=True)) | {"seconds": seconds} | setting.measure(model)
        with config.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(*key, f"KL {row['kl']:.3f}, answers {row['accuracy'].get('tasks', 0):.2f}", flush=True)

    if (key := (config.name, "original", 0, 0, "one-shot")) not in done:
        keep(key, time.process_time(), setting.original)
    for seed in config.seeds:
        samples, blocks = InputSamples(), setting.calibration_blocks(seed)
        layers = expert_layers(setting.original)
        statistics = record(setting.original, layers, blocks, 8, samples=samples)
        for experts in config.experts:
            for arm in config.arms:
                heals = arm in HEALED and experts in config.healed_experts
                stages = [stage for stage in config.stages if stage == "one-shot" or heals]
                keys = [(config.name, arm, experts, seed, stage) for stage in stages]
                if not set(keys) - done:
                    continue
                begin = time.process_time()
                compressed = compress(setting, arm, experts, seed, (statistics, samples))
                for key in keys:
                    if key in done:
                        continue
                    model = copy.deepcopy(compressed)
                    if key[-1] != "one-shot":
                        begin = time.process_time()
                        heal(
                            model,
                            setting.original,
                            setting.healing_rows,
                            key[-1],
                            steps=config.heal_steps,
                            seed=seed,
                            batch_size=config.heal_batch,
                            learning_rate=config.learning_rate,
                        )
                    keep(key, begin, model)


if __name__ == "__main__":
    main(tyro.cli(RivalsConfig))
