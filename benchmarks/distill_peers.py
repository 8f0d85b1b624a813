"""The fused JSD beside TRL's and Liger's, in one run on the CPU.

    pip install --no-deps trl liger-kernel
    python benchmarks/distill_peers.py

The same synthetic hidden states and heads, the same loss (beta = 0.5, tau = 1, mean over rows; the values are
compared first), forward and backward by the student's hidden states and head. TRL: what its
`DistillationTrainer` calls; Liger: `LigerFusedLinearJSDLoss`, not compiled. Both are made for GPUs, where
they have kernels that do not run here. Time and memory are measured as in `distill_heads.py`. Writes
`benchmarks/results/distill_peers.json` and the table of `docs/distill.md`.
"""

# N rows, V vocabulary, D hidden width, R rounds

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from distill_heads import DTYPES, SIZES, Case, interval, memory, print_memory, step, times
from dropout_report import insert_table, markdown
from moekit.distill import fused, losses
from torch import Tensor

NAME = "distill_peers"
BASE = "dense torch"
ALIKE = 1e-3
"""Largest relative difference of the values."""


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """Measure the generalised JSD of three libraries, and dense."""

    sizes: tuple[str, ...] = tuple(SIZES)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    rounds: int = 5
    """One more comes first and does not count."""
    memory_of: str | None = None
    """Print the memory of this one variant, for the first size and dtype; the program calls itself so."""
    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/distill.md")


def dense(case: Case) -> Tensor:
    """Whole logits."""
    return losses.jsd(*case.logits()).mean()


def ours(case: Case) -> Tensor:
    """In tiles."""
    return case.fused(fused.jsd())


def trl(case: Case) -> Tensor:
    """TRL's chunked divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = case.teacher
    found, _ = ChunkedDivergenceFunction.apply(
        case.hidden, case.weight, None, teacher.hidden, teacher.head.weight, None, 0.5
    )
    return found.mean()


def liger(case: Case) -> Tensor:
    """Liger's chunked loss; half of it is the weight of the soft loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    teacher = case.teacher
    return loss(case.hidden, case.weight, teacher.hidden, teacher.head.weight, case.labels)


VARIANTS: dict[str, Callable[[Case], Tensor]] = {BASE: dense, "moekit": ours, "TRL": trl, "Liger": liger}


def check_alike(case: Case) -> None:
    """Refuse to compare different losses."""
    values = {name: float(variant(case).detach()) for name, variant in VARIANTS.items()}
    for name, value in values.items():
        if abs(value - values[BASE]) > ALIKE * abs(values[BASE]):
            raise ValueError(f"{name} computes {value} and {BASE} {values[BASE]}: another loss")


def compare(size: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """All variants of one size and dtype, interleaved."""
    case = Case(*SIZES[size], DTYPES[dtype])
    if dtype == "float32":
        check_alike(case)
    found = times(VARIANTS, lambda variant: step(case, VARIANTS[variant]), rounds)
    rows = []
    for variant in VARIANTS:
        row: dict[str, Any] = {"size": size, "dtype": dtype, "variant": variant}
        row["megabytes"] = memory(__file__, size, dtype, variant)
        row["seconds"] = float(np.median(found[variant]))
        row["time_to_dense"] = row["seconds"] / float(np.median(found[BASE]))
        row["time_to_dense_95"] = interval(found[variant], found[BASE])
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each variant."""
    body = []
    for row in rows:
        n, d, v = SIZES[row["size"]]
        low, high = row["time_to_dense_95"]
        base = next(
            r for r in rows if r["variant"] == BASE and all(r[k] == row[k] for k in ("size", "dtype"))
        )
        cells = [f"V = {v:,}, D = {d}, N = {n}, {row['dtype']}", row["variant"], f"{row['seconds']:.2f}"]
        cells += [f"{row['time_to_dense']:.2f} ({low:.2f}–{high:.2f})", f"{row['megabytes']:.0f}"]
        body.append([*cells, f"{row['megabytes'] / base['megabytes']:.2f}"])
    return markdown(["size", "JSD by", "step, s", "time / dense", "peak, MB", "memory / dense"], body)


def main(config: PeersConfig) -> None:
    """Measure, write the file and the table."""
    torch.set_num_threads(1)
    if config.memory_of is not None:
        print_memory(config.sizes[0], config.dtypes[0], VARIANTS[config.memory_of])
        return
    try:
        versions = {name: version(name) for name in ("trl", "liger-kernel", "torch")}
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install --no-deps trl liger-kernel") from error
    rows = [
        r for dtype in config.dtypes for size in config.sizes for r in compare(size, dtype, config.rounds)
    ]
    text = json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
    (config.results / f"{NAME}.json").write_text(text, encoding="utf-8")
    document = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(document, NAME, table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(PeersConfig))
