"""Table and plot of `compress_quality.py` from its JSON alone: `python quality_report.py FILE...`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

PALETTE = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#D55E00")


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % Student interval (0 for a single seed)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, float(half)


def rows_of(result: dict[str, Any], variant: str, experts: int) -> list[dict[str, Any]]:
    """Rows of all seeds."""
    return [r for r in result["rows"] if r["variant"] == variant and r["experts"] == experts]


def table(result: dict[str, Any]) -> str:
    """Markdown: a block of variants for each number of experts, mean and half interval over the seeds."""
    domains = list(result["original"]["accuracy"])
    head = [
        "experts",
        "variant",
        "KL (nats/token)",
        "perplexity",
        "top-1 agreement",
        *(f"{d} answers" for d in domains),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = result["original"]
    cells = [str(result["num_experts"]), "original", "0", f"{first['perplexity']:.2f}", "1"]
    lines.append("| " + " | ".join([*cells, *(f"{first['accuracy'][d]:.0%}" for d in domains)]) + " |")
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    for experts in sorted({row["experts"] for row in result["rows"]}, reverse=True):
        for variant in variants:
            rows = rows_of(result, variant, experts)
            if not rows:
                continue
            cells = [str(experts), variant]
            for key, digits in (("kl", 3), ("perplexity", 2), ("top1_agreement", 3)):
                mean, half = mean_and_interval([row[key] for row in rows])
                cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
            for domain in domains:
                mean, half = mean_and_interval([row["accuracy"][domain] for row in rows])
                cells.append(f"{mean:.0%} ± {half:.0%}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any], title: str) -> Figure:
    """KL against the experts kept, one line for each variant, bars are 95 % intervals over seeds."""
    counts = sorted({row["experts"] for row in result["rows"]})
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    fig = Figure(figsize=(7, 4.2), layout="constrained")
    axes = fig.subplots()
    for index, variant in enumerate(variants):
        measured = [mean_and_interval([row["kl"] for row in rows_of(result, variant, n)]) for n in counts]
        means, halves = zip(*measured, strict=True)
        places = np.arange(len(counts)) + (index - len(variants) / 2 + 0.5) * 0.02
        style = {"color": PALETTE[index % len(PALETTE)], "marker": "o", "markersize": 5, "linewidth": 1.6}
        axes.errorbar(places, means, yerr=halves, label=variant, capsize=3, **style)
    axes.set_xticks(range(len(counts)), [f"{n} of {result['num_experts']}" for n in counts])
    axes.set_xlabel("experts kept in a layer (mean)")
    axes.set_ylabel("KL to the original (nats per token)")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return fig


def write_tables(path: Path, result: dict[str, Any]) -> None:
    """Write `FILE.md` and `FILE.png` beside the JSON file."""
    path.with_suffix(".md").write_text(table(result), encoding="utf-8")
    figure(result, f"One-shot compression: {result['config']['name']}").savefig(
        path.with_suffix(".png"), dpi=110
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_tables(Path(argument), json.loads(Path(argument).read_text(encoding="utf-8")))
