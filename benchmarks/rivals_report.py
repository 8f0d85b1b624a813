"""Table and figure of `compress_rivals.py`: `python benchmarks/rivals_report.py`.

Writes `docs/compress_rivals.md` and `docs/figures/compress_rivals.png` from the results alone. Means over the
calibration seeds ± half of a 95 % Student interval.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from distill_report import cell
from dropout_report import markdown
from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results/compress_rivals.jsonl")
DOCS = Path("docs")
STAGES = {"one-shot": "one-shot", "router": "routers healed", "kd": "all weights healed"}
SHOWN = ("M-SMoE", "HC-SMoE", "REAM", "REAP", "EAN", "MAN", "frequency", "AIMER", "random", "MoNE")
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
    "#9aa0a6",
    "#c9cdd2",
    "#7a4fb5",
)
HEAD = """# Every method on the same models

Made by `benchmarks/compress_rivals.py` and `benchmarks/rivals_report.py`: the same calibration tokens
(32,768), held-out tokens (16,384) and numbers of experts for all, nothing tuned for one. Means over the
calibration seeds ± half of a 95 % Student interval (none for one seed). *Answers*: share of 100 questions of
the tasks domain that greedy generation answers letter by letter. *Loops*: share of 32 continuations that end
in a loop. *MB*: of all tensors in float32. *s*: to compress, the fastest seed, on one busy core. Healing:
64 steps of 8 x 256 tokens, learning rate 3e-4, for both kinds; whatever the method, the median took
{router:.0f} s for the routers and {kd:.0f} s for all weights.

![KL and answers against bytes, one-shot](figures/compress_rivals.png)
"""


def rows_of(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values, in the order of their seeds."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda row: row["seed"])


def table(rows: list[dict[str, Any]], model: str) -> str:
    """A line for each number of experts, stage and method, the lowest KL first."""
    original = rows_of(rows, model=model, arm="original")[0]
    first = ["16", "", "original", "0", f"{original['perplexity']:.2f}", "1"]
    first += [f"{original['accuracy']['tasks']:.2f}", f"{original['loop_share']:.2f}"]
    body = [[*first, f"{original['bytes'] / 1e6:.1f}", ""]]
    for experts in (12, 8, 4):
        for stage, name in STAGES.items():
            part = rows_of(rows, model=model, experts=experts, stage=stage)
            arms = sorted(
                {row["arm"] for row in part}, key=lambda a: np.mean([r["kl"] for r in part if r["arm"] == a])
            )
            for arm in arms:
                own = [row for row in part if row["arm"] == arm]
                body.append(
                    [
                        str(experts),
                        name,
                        arm,
                        cell([r["kl"] for r in own], 3),
                        cell([r["perplexity"] for r in own], 2),
                        cell([r["top1_agreement"] for r in own], 3),
                        cell([r["accuracy"]["tasks"] for r in own], 2),
                        cell([r["loop_share"] for r in own], 2),
                        f"{np.mean([r['bytes'] for r in own]) / 1e6:.1f}",
                        f"{min(r['seconds'] for r in own):.1f}" if stage == "one-shot" else "",
                    ]
                )
    names = ["experts", "stage", "method", "KL", "perplexity", "top-1", "answers", "loops", "MB", "s"]
    return markdown(names, body)


def figure(rows: list[dict[str, Any]], models: list[str]) -> Figure:
    """KL and answers against bytes, a line for each method, a row for each model."""
    made = Figure(figsize=(9, 3.3 * len(models)), layout="constrained")
    grid = made.subplots(len(models), 2, squeeze=False)
    for model, line in zip(models, grid, strict=True):
        original = rows_of(rows, model=model, arm="original")[0]
        for arm, colour in zip(SHOWN, COLOURS, strict=True):
            sizes, values = [], ([], [])
            for experts in (4, 8, 12):
                own = rows_of(rows, model=model, arm=arm, experts=experts, stage="one-shot")
                if own:
                    sizes.append(np.mean([r["bytes"] for r in own]) / 1e6)
                    values[0].append(np.mean([r["kl"] for r in own]))
                    values[1].append(100 * np.mean([r["accuracy"]["tasks"] for r in own]))
            for axes, numbers in zip(line, values, strict=True):
                axes.plot(sizes, numbers, marker="o", markersize=4, linewidth=1.5, color=colour, label=arm)
        line[0].set_yscale("log")
        line[0].set_ylabel(f"{model}\nKL, nats per token")
        line[1].set_ylabel("questions answered, %")
        line[1].axhline(100 * original["accuracy"]["tasks"], color="#30363d", linestyle="--", linewidth=1)
        line[1].set_ylim(bottom=0)
        for axes in line:
            axes.set_xlabel("MB of tensors")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    made.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return made


def main() -> None:
    """Write document and figure."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    models = list(dict.fromkeys(row["model"] for row in rows))
    medians = {s: float(np.median([r["seconds"] for r in rows if r["stage"] == s])) for s in ("router", "kd")}
    parts = [HEAD.format(**medians), *(f"## {model}\n\n{table(rows, model)}" for model in models)]
    (DOCS / "compress_rivals.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    figure(rows, models).savefig(DOCS / "figures" / "compress_rivals.png", dpi=88)


if __name__ == "__main__":
    main()
