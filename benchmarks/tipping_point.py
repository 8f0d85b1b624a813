"""How far to compress: fixed schedules, extrapolation, and the controller that knows what it does not know.

    python benchmarks/tipping_point.py --models MODEL ... --data valid.jsonl.gz
    python benchmarks/tipping_point.py ... --train train.jsonl.gz --heal-steps 16

Every way goes down by pruning (EAN), step by step from the original, measures quality on held-out text after
each cut, takes the last cut back if it fell below the floor, and ends when it has, or when its rule says so.
Fixed schedules take a share of the remaining experts; extrapolations fit a line or a logistic curve (chosen
by AIC) to the cuts so far, after two single ones; the controller is that of `moekit compress
--until-collapse-risk`. With `--heal-steps` the routers learn from the original after every cut. Seeds choose
the calibration text and the held-out text. Writes `benchmarks/results/tipping_point.jsonl` (rows that are
there are not run again), the figure and the tables of `docs/tipping_point.md`.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from compress_rivals import heal
from dropout_report import insert_table, markdown
from fishery import interval
from matplotlib.figure import Figure
from moekit.compress import METHODS, apply_plan
from moekit.compress.retained_quality import context_information, retained_quality
from moekit.compress.tipping_point.controller import believe, decide
from moekit.moe import expert_layers, load_documents, split_blocks, token_blocks
from moekit.moe.figure_style import AFTER, BAD, GRID, INK, figure_png, styled
from moekit.scripts.calibrate import record
from moekit.scripts.train_data import BlockRows
from scipy.optimize import curve_fit
from transformers import AutoModelForCausalLM, AutoTokenizer

Rule = Callable[[list[int], list[tuple[float, float]], int], int | None]
"""From the sizes (the present one first), the points so far and the whole to the next size; None to stop."""


@dataclass(frozen=True, kw_only=True)
class TippingConfig:
    """Compare the ways down."""

    models: tuple[str, ...]
    data: str
    train: str | None = None
    """Text to heal on."""
    heal_steps: int = 0
    """Of the routers, after each cut."""
    seeds: tuple[int, ...] = (0, 1, 2)
    floors: tuple[float, ...] = (0.9, 0.7)
    calibration_tokens: int = 16_384
    eval_tokens: int = 8_192
    seq_len: int = 256
    threads: int = 1
    results: Path = Path("benchmarks/results/tipping_point.jsonl")
    document: Path = Path("docs/tipping_point.md")


def fixed(share: float, sizes: list[int], _: list[tuple[float, float]], whole: int) -> int | None:
    """A share of what is left, at least one expert."""
    wanted = min(sizes[0] - 1, round(sizes[0] * (1 - share)))
    return max(wanted, sizes[-1]) if len(sizes) > 1 else None


def line(kept: Any, slope: float, offset: float) -> Any:
    """Quality by share kept."""
    return offset + slope * kept


def logistic(kept: Any, middle: float, steepness: float) -> Any:
    """From 0 to 1."""
    return 1 / (1 + np.exp(-np.clip(steepness * (kept - middle), -50, 50)))


def extrapolated(floor: float, sizes: list[int], points: list[tuple[float, float]], whole: int) -> int | None:
    """As far as the curve with the lower AIC stays above the floor."""
    if len(sizes) < 2:
        return None
    if len(points) < 2:
        return sizes[1]
    kept, found = np.array([(1.0, 1.0), *points]).T
    best: tuple[float, Any] | None = None
    for curve, start in ((line, (1.0, 0.0)), (logistic, (0.3, 10.0))):
        try:
            fitted, _ = curve_fit(curve, kept, found, p0=start, maxfev=5000)
        except RuntimeError:
            continue
        residual = float(((curve(kept, *fitted) - found) ** 2).mean()) + 1e-12
        aic = len(kept) * np.log(residual) + 2 * (len(fitted) + 1)
        if best is None or aic < best[0]:
            best = (aic, lambda k, c=curve, f=tuple(fitted): c(k, *f))
    assert best is not None
    allowed = [size for size in sizes[1:] if best[1](size / whole) >= floor]
    return min(allowed) if allowed else None


def controlled(
    risk: float, floor: float, sizes: list[int], points: list[tuple[float, float]], whole: int
) -> int | None:
    """The controller."""
    belief = believe(points, np.array(sizes) / whole, floor)
    return decide(sizes, belief, risk=risk, whole=whole).size


def rules(floor: float) -> dict[str, Rule]:
    """All ways down."""
    return {
        "10 % a step": partial(fixed, 0.10),
        "25 % a step": partial(fixed, 0.25),
        "50 % a step": partial(fixed, 0.50),
        "extrapolation": partial(extrapolated, floor),
        "controller, risk 0.05": partial(controlled, 0.05, floor),
        "controller, risk 0.2": partial(controlled, 0.2, floor),
    }


class Descents:
    """Cuts of one model with one seed; what two ways share is computed once."""

    def __init__(self, config: TippingConfig, model: str, seed: int) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.original: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        blocks = token_blocks(load_documents(config.data), tokenizer, seq_len=config.seq_len, seed=seed)
        pool, self.held_out = split_blocks(blocks, held_out_tokens=config.eval_tokens, seed=seed)
        self.pool = pool.select(range(config.calibration_tokens // config.seq_len))
        self.seed, self.heal_steps, self.rows = seed, config.heal_steps, None
        if config.heal_steps and config.train:
            training = token_blocks(
                load_documents(config.train),
                tokenizer,
                seq_len=config.seq_len,
                max_tokens=config.heal_steps * 8 * config.seq_len,
                seed=seed,
            )
            self.rows = BlockRows(training)
        self.information = context_information(self.original, self.held_out)
        layers = expert_layers(self.original)
        self.whole, self.smallest = layers[0].num_experts, layers[0].top_k
        self.known: dict[tuple[int, ...], tuple[Any, float]] = {(): (self.original, 1.0)}

    def cut(self, path: tuple[int, ...]) -> float:
        """Quality at the end of a path of sizes."""
        if path not in self.known:
            self.cut(path[:-1])
            model = copy.deepcopy(self.known[path[:-1]][0])
            layers = expert_layers(model)
            statistics = record(model, layers, self.pool, 8)
            apply_plan(model, METHODS["ean"](layers, statistics, experts=path[-1]))
            if self.rows is not None:
                heal(model, self.original, self.rows, "router", steps=self.heal_steps, seed=self.seed)
            quality = retained_quality(self.original, model, self.held_out, self.information)
            self.known[path] = (model, min(quality, 1.0))
        return self.known[path][1]


def descend(descents: Descents, rule: Rule, floor: float) -> dict[str, Any]:
    """Follow a rule to its end."""
    path: tuple[int, ...] = ()
    points: list[tuple[float, float]] = []
    crossed = False
    while not crossed:
        present = path[-1] if path else descents.whole
        sizes = list(range(present, descents.smallest - 1, -1))
        chosen = rule(sizes, points, descents.whole)
        if chosen is None or chosen >= present:
            break
        quality = descents.cut((*path, chosen))
        points.append((chosen / descents.whole, quality))
        crossed = quality < floor
        if not crossed:
            path = (*path, chosen)
    reached = path[-1] if path else descents.whole
    return {
        "experts": reached,
        "kept": reached / descents.whole,
        "quality": descents.cut(path) if path else 1.0,
        "crossed": crossed,
        "deepest fall": min([q for _, q in points], default=1.0),
        "steps": len(points),
        "points": points,
    }


def main(config: TippingConfig) -> None:
    """Run what is missing, then report."""
    if bool(config.heal_steps) != bool(config.train):
        raise SystemExit("--heal-steps and --train belong together")
    torch.set_num_threads(config.threads)
    lines = config.results.read_text(encoding="utf-8").splitlines() if config.results.exists() else []
    rows = list(map(json.loads, lines))
    done = {(row["heal_steps"], row["model"], row["seed"], row["floor"], row["way"]) for row in rows}
    for model in config.models:
        for seed in config.seeds:
            every = [(floor, way) for floor in config.floors for way in rules(floor)]
            known = (config.heal_steps, Path(model).name, seed)
            wanted = [key for key in every if (*known, *key) not in done]
            if not wanted:
                continue
            descents = Descents(config, model, seed)
            for floor, way in wanted:
                row = {"model": Path(model).name, "seed": seed, "floor": floor, "way": way}
                row |= {
                    "heal_steps": config.heal_steps,
                    "whole": descents.whole,
                    **descend(descents, rules(floor)[way], floor),
                }
                rows.append(row)
                with config.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                shown = ("kept", "quality", "crossed", "steps")
                print(row["model"], seed, floor, way, {key: row[key] for key in shown}, flush=True)
    bare, healed = ([row for row in rows if bool(row["heal_steps"]) is trained] for trained in (False, True))
    text = config.document.read_text(encoding="utf-8")
    text = insert_table(text, "tipping_point", table(bare))
    if healed:
        text = insert_table(text, "tipping_point_healed", table(healed))
    config.document.write_text(text, encoding="utf-8")
    figure = figure_png(picture(bare), 110)
    (config.document.parent / "figures" / "tipping_point.png").write_bytes(figure)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over models and seeds, with 95 % intervals of them."""
    cells = []
    for floor in sorted({row["floor"] for row in rows}, reverse=True):
        for way in rules(floor):
            found = [row for row in rows if (row["floor"], row["way"]) == (floor, way)]
            numbers = [interval([float(row[key]) for row in found]) for key in ("kept", "crossed")]
            fall = f"{min(row['deepest fall'] for row in found):.2f}"
            cells.append(
                [f"{floor:g}", way, *numbers, fall, interval([float(row["steps"]) for row in found])]
            )
    head = ["floor", "way", "experts kept, share", "crossed the floor, share", "deepest fall", "cuts"]
    return markdown(head, cells)


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Every cut of every way: what was kept against quality."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    with styled():
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        for axes, model in zip(
            figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True
        ):
            seen: set[tuple[float, float]] = set()
            for row in rows:
                if row["model"] == model:
                    seen |= {(kept, quality) for kept, quality in row["points"]}
            axes.scatter(*zip(*seen, strict=True), s=8, color=GRID, label="all cuts")
            looks = (
                ("25 % a step", INK, "^"),
                ("extrapolation", BAD, "s"),
                ("controller, risk 0.05", AFTER, "o"),
            )
            for area, (way, colour, marker) in zip((90, 48, 14), looks, strict=True):
                ends = [(r["kept"], r["quality"]) for r in rows if r["model"] == model and r["way"] == way]
                face = colour if marker == "o" else "none"  # what lies within stays to be seen
                look = {"s": area, "edgecolors": colour, "facecolors": face, "marker": marker}
                axes.scatter(*zip(*ends, strict=True), label=f"end of {way}", **look)
            for floor in {row["floor"] for row in rows}:
                axes.axhline(floor, color=BAD, linestyle=":", linewidth=0.8)
            axes.set_title(model, loc="left")
            axes.set(xlabel="share of the experts kept", ylim=(0, 1.05))
        figure.axes[0].set_ylabel("quality")
        figure.axes[-1].legend(fontsize=7, loc="lower right")
    return figure


if __name__ == "__main__":
    main(tyro.cli(TippingConfig))
