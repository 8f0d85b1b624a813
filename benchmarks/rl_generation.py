"""How fast completions are sampled: `EmbeddedGenerator` against `model.generate` of Transformers.

    python benchmarks/rl_generation.py

A random Qwen3-MoE (2.3 M parameters: D=128, 4 layers, E=8, K=2, V=2,048), one thread. In each round both
write the completions of every case once, in random order; the figure is the ratio of median CPU times per
written token, with a 95 % bootstrap interval. `generate` gets a row for each completion, samples with the
same settings and records no log-probs, which the generator does. Writes
`benchmarks/results/rl_generation.json`.
"""

# B completions, R rounds

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from distill_heads import interval
from moekit.rl.generation.embedded import EmbeddedGenerator
from moekit.rl.generation.generator import SampleRequest
from moekit.rl.generation.settings import SamplingSettings
from rl_speed import VOCAB, tiny_config
from transformers import GenerationConfig, Qwen3MoeForCausalLM

PAD, SAMPLES = 0, 8


@dataclass(frozen=True)
class Case:
    """Completions that are written at once; each prompt gets 8."""

    name: str
    prompt_lengths: tuple[int, ...]
    num_ends: int = 0
    """Of the vocabulary's tokens, how many end a completion."""
    truncates: bool = False


CASES = (
    Case("16 rows", (16, 16)),
    Case("16 rows, padded prompts", (12, 16)),
    Case("16 rows, top-k and top-p", (16, 16), truncates=True),
    Case("16 rows, half end early", (16, 16), num_ends=32),
    Case("16 rows, prompts of 256", (256, 256)),
    Case("64 rows, half end early", (16,) * 8, num_ends=32),
)


@dataclass(frozen=True, kw_only=True)
class GenerationSpeedConfig:
    """Time the sampling of completions."""

    max_new_tokens: int = 64
    rounds: int = 7
    """One more comes first and does not count."""
    results: Path = Path("benchmarks/results")


def build() -> Qwen3MoeForCausalLM:
    """Random weights."""
    torch.manual_seed(0)
    config = tiny_config(pad_token_id=PAD, bos_token_id=None, eos_token_id=None)
    return Qwen3MoeForCausalLM(config).eval()


def by_generator(model: Any, case: Case, config: GenerationSpeedConfig) -> Callable[[], int]:
    """Write a case's completions, and tell how many tokens that were."""
    generator = EmbeddedGenerator(model, eos_token_ids=range(1, case.num_ends + 1), pad_token_id=PAD)
    options: dict[str, Any] = {"top_k": 50, "top_p": 0.95} if case.truncates else {}
    settings = SamplingSettings(max_new_tokens=config.max_new_tokens, **options)
    seeds = iter(range(10**6))

    def write() -> int:
        requests = [
            SampleRequest(prompt_ids=tuple(prompt), num_samples=SAMPLES, seed=next(seeds))
            for prompt in prompts(case)
        ]
        return sum(len(sample.ids) for group in generator.generate(requests, settings) for sample in group)

    return write


def by_transformers(model: Any, case: Case, config: GenerationSpeedConfig) -> Callable[[], int]:
    """The same by `model.generate`."""
    longest = max(case.prompt_lengths)
    rows = [prompt for prompt in prompts(case) for _ in range(SAMPLES)]
    ids_BS = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ends = list(range(1, case.num_ends + 1))
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=config.max_new_tokens,
        temperature=1.0,
        top_k=50 if case.truncates else 0,
        top_p=0.95 if case.truncates else 1.0,
        pad_token_id=PAD,
        eos_token_id=ends or None,
    )

    def write() -> int:
        output = model.generate(input_ids=ids_BS, attention_mask=mask_BS, generation_config=settings)
        is_end_BN = torch.isin(output[:, longest:], torch.tensor(ends, dtype=torch.long))
        return int((is_end_BN.cumsum(1) - is_end_BN.long() == 0).sum())

    return write


def prompts(case: Case) -> list[list[int]]:
    """Random tokens, none of which ends a text."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(case.num_ends + 1, VOCAB, (n,), generator=generator) for n in case.prompt_lengths]
    return [draw.tolist() for draw in draws]


def seconds_per_token(write: Callable[[], int]) -> float:
    """CPU time."""
    start = time.process_time()
    num_tokens = write()
    return (time.process_time() - start) / num_tokens


def main(config: GenerationSpeedConfig) -> None:
    """Measure, print the table and write the file."""
    torch.set_num_threads(1)
    model, order = build(), np.random.default_rng(0)
    writers = {
        (case, name): make(model, case, config)
        for case in CASES
        for name, make in (("generator", by_generator), ("transformers", by_transformers))
    }
    keys, seconds = list(writers), {key: [] for key in writers}
    for _ in range(config.rounds + 1):
        for index in order.permutation(len(keys)):
            seconds[keys[index]].append(seconds_per_token(writers[keys[index]]))
    rows = []
    print("| case | transformers, tokens/s | generator, tokens/s | ratio (95 %) |\n|---|---|---|---|")
    for case in CASES:
        ours_R = np.array(seconds[case, "generator"][1:])
        theirs_R = np.array(seconds[case, "transformers"][1:])
        ratio = float(np.median(theirs_R) / np.median(ours_R))
        row = {"case": asdict(case), "ratio": ratio, "ratio_95": interval(theirs_R, ours_R)}
        row["tokens_per_second"] = {
            "generator": float(1 / np.median(ours_R)),
            "transformers": float(1 / np.median(theirs_R)),
        }
        rows.append(row)
        low, high = row["ratio_95"]
        print(
            f"| {case.name} | {1 / np.median(theirs_R):.0f} | {1 / np.median(ours_R):.0f} "
            f"| {ratio:.2f} ({low:.2f}–{high:.2f}) |",
            flush=True,
        )
    machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": 1}
    settings = {"max_new_tokens": config.max_new_tokens, "rounds": config.rounds}
    result = {**settings, "machine": machine, "rows": rows}
    config.results.mkdir(parents=True, exist_ok=True)
    file = config.results / "rl_generation.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(GenerationSpeedConfig))
