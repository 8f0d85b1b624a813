"""How long a distillation step of the heads takes and how much memory, fused and dense.

    python benchmarks/distill_heads.py
    python benchmarks/distill_heads.py --redraw    # the table and the figure from the file alone

Synthetic hidden states and random heads, no backbone; student and teacher by hidden states, all student
heads trained; a step is forward and backward. *Time*: in each round every variant runs once, in random order,
in one process of one thread, and CPU time is compared. A figure is a ratio of medians over rounds with a 95 %
bootstrap interval. *Memory*: each variant runs one step in a fresh process: the peak of its resident set less
the resident set before the step, so gradients count and weights do not. (`VmHWM` of Linux; a new process
inherits `ru_maxrss` from its parent.) A tiny step comes first there, so that libraries are loaded. Writes
`benchmarks/results/distill_heads.json` and `docs/figures/distill_heads.png`.
"""

# N rows, V vocabulary, D hidden width, R rounds

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from distill_heads_report import figure, goals, table
from moekit.distill import fused, losses
from torch import Tensor, nn
from torch.nn import functional

SIZES = {"49k": (1024, 576, 49_152), "152k": (512, 1024, 151_936)}
"""N, D and V."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 200
TEMPERATURE = 2.0
BASELINES = {
    "fused KL": "dense KL",
    "fused BinaryKL-Norm": "dense BinaryKL-Norm",
    "fused plain KD": "dense plain KD",
    "fused dual head, linear": "dense plain KD",
    "fused dual head, rank 200": "dense plain KD",
}
"""What each variant is compared with."""


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Measure the fused losses against dense ones on this machine."""

    sizes: tuple[str, ...] = tuple(SIZES)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """Of hidden states and weights; sums are in single precision anyhow."""
    rounds: int = 7
    """One more comes first and does not count."""
    threads: int = 1
    memory_of: str | None = None
    """Print the memory of this one variant, for the first size and dtype; the program calls itself so."""
    redraw: bool = False
    """Measure nothing; show what the file holds."""
    results: Path = Path("benchmarks/results")
    figures: Path = Path("docs/figures")


class Case:
    """One size: hidden states of both sides, labels, heads."""

    def __init__(self, num_rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, gain: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=dtype).normal_(0, gain, generator=generator)

        def weight(columns: int) -> nn.Parameter:
            return nn.Parameter(random(vocabulary, columns, gain=columns**-0.5))

        self.hidden = random(num_rows, width).requires_grad_()
        self.weight, self.auxiliary, self.narrow = weight(width), weight(width), weight(RANK)
        self.down = nn.Parameter(random(RANK, width, gain=width**-0.5))
        self.labels = torch.randint(vocabulary, (num_rows,), generator=generator)
        head = fused.Head(weight=weight(width).detach())
        self.teacher = fused.TeacherStates(random(num_rows, width), head)
        self.alpha = losses.published_weight(vocabulary, "sum")

    def logits(self) -> tuple[Tensor, Tensor]:
        """Dense, of both sides."""
        ours = (self.hidden @ self.weight.T).float()
        return ours, (self.teacher.hidden @ self.teacher.head.weight.T).float()

    def fused(self, objective: fused.Objective) -> Tensor:
        """Loss of the main head."""
        labels = self.labels if objective.needs_labels else None
        teacher = self.teacher if objective.needs_teacher else None
        head = fused.Head(weight=self.weight)
        return fused.fused_loss(self.hidden, head, objective, teacher=teacher, labels=labels)

    def dual(self, states: Tensor, weight: Tensor) -> Tensor:
        """Loss of two heads."""
        objective = fused.binary_kl_norm(temperature=TEMPERATURE)
        auxiliary = fused.fused_loss(states, fused.Head(weight=weight), objective, teacher=self.teacher)
        return self.fused(fused.cross_entropy()) + self.alpha * auxiliary

    def forget(self) -> None:
        """Drop all gradients, as an optimizer's step would."""
        for leaf in (self.hidden, self.weight, self.auxiliary, self.narrow, self.down):
            leaf.grad = None


def torch_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL as torch users write it."""
    log_s, t = functional.log_softmax(ours / TEMPERATURE, -1), functional.softmax(theirs / TEMPERATURE, -1)
    return functional.kl_div(log_s, t, reduction="batchmean") * TEMPERATURE**2


def dense_plain(case: Case) -> Tensor:
    """Cross-entropy and KL on one head."""
    ours, theirs = case.logits()
    return functional.cross_entropy(ours, case.labels) + torch_kl(ours, theirs)


def bottleneck(case: Case) -> Tensor:
    """Cross-entropy on the main head, BinaryKL-Norm behind a bottleneck."""
    return case.dual(functional.relu(case.hidden @ case.down.T), case.narrow)


VARIANTS: dict[str, Callable[[Case], Tensor]] = {
    "dense KL": lambda case: torch_kl(*case.logits()),
    "fused KL": lambda case: case.fused(fused.kl(temperature=TEMPERATURE)),
    "dense BinaryKL-Norm": lambda case: losses.binary_kl_norm(*case.logits(), temperature=TEMPERATURE).mean(),
    "fused BinaryKL-Norm": lambda case: case.fused(fused.binary_kl_norm(temperature=TEMPERATURE)),
    "dense plain KD": dense_plain,
    "fused plain KD": lambda case: case.fused(
        fused.cross_entropy_plus(fused.kl(temperature=TEMPERATURE), 1.0)
    ),
    "fused dual head, linear": lambda case: case.dual(case.hidden, case.auxiliary),
    "fused dual head, rank 200": bottleneck,
}


def step(case: Case, variant: Callable[[Case], Tensor]) -> float:
    """Run forward and backward; CPU seconds, without those of dropping the gradients."""
    start = time.process_time()
    variant(case).backward()
    seconds = time.process_time() - start
    case.forget()
    return seconds


def resident(*, peak: bool = False) -> float:
    """Megabytes of memory of this process, now or at their peak."""
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def print_memory(size: str, dtype: str, variant: Callable[[Case], Tensor]) -> None:
    """Megabytes that one step adds at its peak."""
    step(Case(8, 16, 64, DTYPES[dtype]), variant)
    case = Case(*SIZES[size], DTYPES[dtype])
    before = resident()
    step(case, variant)
    print(resident(peak=True) - before)


def memory(program: str, size: str, dtype: str, variant: str) -> float:
    """`print_memory` in a process of its own, which runs the program for that."""
    options = ["--sizes", size, "--dtypes", dtype, "--memory-of", variant]
    command = [sys.executable, str(Path(program).resolve()), *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def times(variants: Iterable[str], run: Callable[[str], float], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds of each variant, one a round, in random order; a first round does not count."""
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds + 1):
        for variant in generator.permutation(list(seconds)):
            seconds[variant].append(run(variant))
    return {variant: np.array(found[1:]) for variant, found in seconds.items()}


def interval(seconds_R: np.ndarray, against_R: np.ndarray | float = 1.0) -> list[float]:
    """95 % interval of the (ratio of) medians, from drawing rounds anew."""
    draws = np.random.default_rng(0).integers(len(seconds_R), size=(2000, len(seconds_R)))
    below = np.median(against_R[draws], 1) if isinstance(against_R, np.ndarray) else against_R
    return [float(q) for q in np.quantile(np.median(seconds_R[draws], 1) / below, [0.025, 0.975])]


def _step_of(case: Case, variant: str) -> float:
    return step(case, VARIANTS[variant])


def measure(config: HeadsConfig) -> list[dict[str, Any]]:
    """All variants of all sizes, each announced as it ends."""
    rows: list[dict[str, Any]] = []
    for dtype in config.dtypes:
        for size in config.sizes:
            megabytes = {variant: memory(__file__, size, dtype, variant) for variant in VARIANTS}
            run = partial(_step_of, Case(*SIZES[size], DTYPES[dtype]))
            seconds = times(VARIANTS, run, config.rounds)
            for variant in VARIANTS:
                row = {"size": size, "dtype": dtype, "variant": variant, "rounds": config.rounds}
                row |= {
                    "seconds": float(np.median(seconds[variant])),
                    "seconds_95": interval(seconds[variant]),
                }
                row["megabytes"] = megabytes[variant]
                for key, base in (("dense", BASELINES.get(variant)), ("fused_kd", "fused plain KD")):
                    if base is not None:
                        row[f"time_to_{key}"] = row["seconds"] / float(np.median(seconds[base]))
                        row[f"time_to_{key}_95"] = interval(seconds[variant], seconds[base])
                        row[f"memory_to_{key}"] = megabytes[variant] / megabytes[base]
                rows.append(row)
                print(row, flush=True)
    return rows


def main(config: HeadsConfig) -> None:
    """Measure, write the file, print the table and draw the figure."""
    torch.set_num_threads(config.threads)
    if config.memory_of is not None:
        print_memory(config.sizes[0], config.dtypes[0], VARIANTS[config.memory_of])
        return
    file = config.results / "distill_heads.json"
    if not config.redraw:
        machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": config.threads}
        sizes = {name: dict(zip(("N", "D", "V"), size, strict=True)) for name, size in SIZES.items()}
        result = {"machine": machine, "sizes": sizes, "rows": measure(config)}
        config.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(file.read_text(encoding="utf-8"))
    print(table(result), goals(result), sep="\n\n")
    config.figures.mkdir(parents=True, exist_ok=True)
    figure(result).savefig(config.figures / "distill_heads.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(HeadsConfig))
