"""How fast SMoE-Dropout is at every share K / E of active experts, against the dense model it was made of.

    python benchmarks/dropout_speed.py
    python benchmarks/dropout_speed.py --redraw    # the table and the figure from the file alone

Four dense shapes and their conversions to E = 16 experts; a training step (forward and backward) and
inference; one FFN, by the grouped and the dense way at every share, and the whole model, by the way that is
chosen by itself. In each round the dense model and all variants run once, in random order, in one process of
one thread, and their CPU time is compared, so that whatever else the machine does hits all alike. A figure is
a ratio of medians over rounds with a bootstrap interval. Where the C library allows, memory is kept between
steps: glibc maps every block of 32 MB anew, which costs up to 5 % of a step, and only some shapes have such
blocks. Prints the share from which the dense way is faster on this machine, which `break_even_share` of
`moe/dropout/experts.py` should follow. Writes
`benchmarks/results/dropout_speed.json`, and table and figure of `docs/train.md`.
"""

# B batch, S sequence, T tokens, D hidden (model) width, E experts, F FFN width, K active experts, R rounds

import copy
import ctypes
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from dropout_report import insert_table
from dropout_speed_report import break_evens, figure, table
from moekit.moe import set_active_experts, smoe_layers, to_smoe_dropout
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

EXPERTS = 16
ACTIVE = (1, 2, 4, 6, 8, 10, 12, 16)
FORCED = {"dense": 0.0, "grouped": 2.0}
"""`SlicedExperts.break_even` that forces a way."""
SHAPES = {
    "gated 576 / 1536": (LlamaConfig, LlamaForCausalLM),
    "gated 1024 / 4096": (LlamaConfig, LlamaForCausalLM),
    "plain 512 / 2048": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "gated 192 / 512": (LlamaConfig, LlamaForCausalLM),
}
"""Config and model by the kind of FFN, D and F."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Measure the speed of SMoE-Dropout against dense models on this machine."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Which to measure."""
    tokens: int = 512
    """T of a step, in sequences of `seq_len`."""
    seq_len: int = 256
    few_tokens: tuple[int, ...] = (1, 16)
    """T of one FFN's inference as decoding does it."""
    layers: int = 2
    """Of the whole models."""
    vocab_size: int = 2048
    seconds: float = 8.0
    """Of CPU time for each of the 24 comparisons, or as long as `rounds` take."""
    rounds: int = 16
    """At least; one more comes first and does not count."""
    most_rounds: int = 200
    threads: int = 1
    redraw: bool = False
    """Measure nothing; show what the file holds."""
    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/train.md")


def keep_memory() -> None:
    """Ask glibc to give no freed memory back: no mapped blocks (M_MMAP_MAX), no M_TRIM_THRESHOLD."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)
    mallopt(-1, 2**31 - 1)


def build(shape: str, config: SpeedConfig) -> Any:
    """Build a random dense model."""
    _, hidden, _, width = shape.split()
    config_class, model_class = SHAPES[shape]
    settings = config_class(
        hidden_size=int(hidden),
        intermediate_size=int(width),
        num_hidden_layers=config.layers,
        num_attention_heads=int(hidden) // 64,
        vocab_size=config.vocab_size,
    )
    torch.manual_seed(0)
    return model_class(settings)


def compare(runs: dict[str, Callable[[], Any]], config: SpeedConfig) -> dict[str, np.ndarray]:
    """Time every run once in each round, in an order drawn anew; CPU seconds by name, one a round."""
    generator = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = 0.0
    for done in range(config.most_rounds + 1):
        if done == 1:
            end = time.process_time() + config.seconds
        elif done > config.rounds and time.process_time() > end:
            break
        for name in generator.permutation(list(runs)):
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def against_dense(seconds_R: np.ndarray, dense_R: np.ndarray) -> dict[str, Any]:
    """Ratio of medians, with an interval from drawing rounds anew."""
    draws = np.random.default_rng(0).integers(len(dense_R), size=(2000, len(dense_R)))
    ratios = np.median(seconds_R[draws], 1) / np.median(dense_R[draws], 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "seconds": float(np.median(seconds_R)),
        "dense_seconds": float(np.median(dense_R)),
        "ratio": float(np.median(seconds_R) / np.median(dense_R)),
        "ratio_95": [float(low), float(high)],
        "rounds": len(dense_R),
    }


def step(module: nn.Module, inputs: dict[str, Any], prepare: Callable[[], None], *, training: bool) -> None:
    """Run one forward, in training with its backward; gradients are dropped, as an optimizer's step would."""
    prepare()
    with torch.set_grad_enabled(training):
        output = module(**inputs)
        if training:
            loss = output.loss if hasattr(output, "loss") else output.square().mean()
            loss.backward()
            module.zero_grad(set_to_none=True)


def compare_ffns(shape: str, num_tokens: int, config: SpeedConfig, *, training: bool) -> list[dict[str, Any]]:
    """One FFN by both ways at every share."""
    model = build(shape, config)
    sparse = to_smoe_dropout(copy.deepcopy(model), EXPERTS)
    name, layer = next(iter(smoe_layers(sparse).items()))
    dense = model.get_submodule(name)
    hidden_TD = torch.randn(1, num_tokens, model.config.hidden_size).requires_grad_(training)

    def prepare(k: int, way: str) -> None:
        layer.active_experts, layer.experts.break_even = k, FORCED[way]

    key = "x" if shape.startswith("gated") else "hidden_states"
    runs: dict[Any, Callable[[], Any]] = {
        "dense model": partial(step, dense, {key: hidden_TD}, lambda: None, training=training)
    }
    for k in ACTIVE:
        for way in FORCED:
            inputs = {"hidden_states": hidden_TD}
            runs[f"{way} {k}"] = partial(step, layer, inputs, partial(prepare, k, way), training=training)
    times = compare(runs, config)
    rows = []
    for k in ACTIVE:
        layer.experts.break_even = None
        with torch.set_grad_enabled(training):
            chosen = "dense" if layer.experts.computes_densely(k, hidden_TD) else "grouped"
        for way in FORCED:
            figures = against_dense(times[f"{way} {k}"], times["dense model"])
            rows.append({"active": k, "way": way, "chosen": way == chosen, **figures})
    return rows


def compare_models(shape: str, config: SpeedConfig, *, training: bool) -> list[dict[str, Any]]:
    """The whole model at every share, by the way that it chooses."""
    model = build(shape, config)
    sparse = to_smoe_dropout(copy.deepcopy(model), EXPERTS)
    ids_BS = torch.randint(config.vocab_size, (config.tokens // config.seq_len, config.seq_len))
    inputs = {"input_ids": ids_BS, "labels": ids_BS, "use_cache": False}
    runs: dict[Any, Callable[[], Any]] = {
        "dense model": partial(step, model, inputs, lambda: None, training=training)
    }
    for k in ACTIVE:
        runs[str(k)] = partial(
            step, sparse, inputs, partial(set_active_experts, sparse, k), training=training
        )
    times = compare(runs, config)
    return [
        {"active": k, "way": "chosen", "chosen": True, **against_dense(times[str(k)], times["dense model"])}
        for k in ACTIVE
    ]


def measure(config: SpeedConfig) -> list[dict[str, Any]]:
    """All comparisons, each announced as it ends."""
    rows: list[dict[str, Any]] = []

    def add(shape: str, part: str, tokens: int, training: bool, found: list[dict[str, Any]]) -> None:
        step_name = "training" if training else "inference"
        rows.extend({"shape": shape, "part": part, "step": step_name, "tokens": tokens, **r} for r in found)
        worst = max(row["ratio"] for row in found if row["chosen"])
        rounds = found[0]["rounds"]
        print(f"{shape}, {part}, T={tokens}, {step_name}: {rounds} rounds, at most {worst:.3f}", flush=True)

    for shape in config.shapes:
        for training in (True, False):
            ffns = compare_ffns(shape, config.tokens, config, training=training)
            add(shape, "FFN", config.tokens, training, ffns)
            add(shape, "model", config.tokens, training, compare_models(shape, config, training=training))
        for tokens in config.few_tokens:
            add(shape, "FFN", tokens, False, compare_ffns(shape, tokens, config, training=False))
    return rows


def main(config: SpeedConfig) -> None:
    """Measure, write the file, print the tables and draw the figure."""
    file = config.results / "dropout_speed.json"
    if not config.redraw:
        torch.set_num_threads(config.threads)
        keep_memory()
        rows = measure(config)
        machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": config.threads}
        result = {"num_experts": EXPERTS, "tokens": config.tokens, "machine": machine, "rows": rows}
        result["break_even"] = break_evens(result)
        config.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(file.read_text(encoding="utf-8"))
    print(table(result))
    text = config.document.read_text(encoding="utf-8")
    shown = insert_table(text, "dropout_speed", table(result, ("chosen",)))
    config.document.write_text(shown, encoding="utf-8")
    figure(result).savefig(config.document.parent / "figures" / "dropout_speed.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
