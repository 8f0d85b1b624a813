"""Speed of compressed layers: reading and writing, merged, pruned and low-rank, beside the original.

    python benchmarks/forward_speed.py

Random Qwen3-MoE models of three shapes, one thread, CPU time (other programs count little), arms in turns;
the best of several runs of each. Merged models are measured with repeated choices folded into one and
without, and as moekit chooses. *GEMM* is the time of plain dense products of the experts' shapes for the same
number of tokens and choices: what no implementation of the experts can beat. Writes
`benchmarks/results/forward_speed.json` and the table of `docs/compress.md`.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from dropout_report import insert_table, markdown
from moekit.compress.low_rank import factorise_layer
from moekit.moe import expert_layers
from moekit.moe.constants import keep_weights, set_constants
from moekit.moe.footprint import footprint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPES = {
    "16 experts, top-2, 160 x 112": (16, 2, 160, 112, 4),
    "64 experts, top-8, 512 x 256": (64, 8, 512, 256, 2),
    "16 experts, top-4, 1024 x 768": (16, 4, 1024, 768, 1),
}
"""Experts, choices, hidden width, FFN width and layers."""
READING, WRITING = (8, 256), (8, 1)


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Measure forwards."""

    rounds: int = 9
    results: Path = Path("benchmarks/results")
    document: Path = Path("docs/compress.md")


def build(shape: tuple[int, int, int, int, int]) -> Any:
    """A random model of a shape."""
    experts, choices, wide, inner, layers = shape
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=wide,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=wide // 32,
        num_key_value_heads=wide // 32,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=choices,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config).eval()


def merged(model: Any, share: int, fold: bool | None = None) -> Any:
    """With one in `share` experts behind all rows of the router."""
    made = copy.deepcopy(model)
    for layer in expert_layers(made):
        kept = layer.num_experts // share
        layer.replace_experts(layer.experts()[:kept], [e % kept for e in range(layer.num_experts)])
        if fold is not None:
            module = layer.experts_module
            module._is_expert_parallel = module.folds_choices = module.eager_folds_choices = fold
    return made


def pruned(model: Any, share: int) -> Any:
    """With one in `share` experts and their rows."""
    made = copy.deepcopy(model)
    for layer in expert_layers(made):
        layer.remove_experts(range(layer.num_experts // share))
    return made


def with_constants(model: Any, share: int) -> Any:
    """With one in `share` experts, and constants for the others."""
    made = copy.deepcopy(model)
    for layer in expert_layers(made):
        kept = layer.num_experts // share
        keep_weights(layer, range(kept))
        set_constants(layer, torch.randn(layer.num_experts - kept, layer.hidden_size))
    return made


def low_rank(model: Any, share: int) -> Any:
    """With all experts at a rank of a `share` of their width."""
    made = copy.deepcopy(model)
    for layer in expert_layers(made):
        factorise_layer(layer, layer.experts()[0].width // share, 0.0)
    return made


ARMS: dict[str, Callable[[Any], Any]] = {
    "original": copy.deepcopy,
    "merged to 1/2, folded": lambda model: merged(model, 2, fold=True),
    "merged to 1/2, not folded": lambda model: merged(model, 2, fold=False),
    "merged to 1/2": lambda model: merged(model, 2),
    "merged to 1/4, folded": lambda model: merged(model, 4, fold=True),
    "merged to 1/4, not folded": lambda model: merged(model, 4, fold=False),
    "merged to 1/4": lambda model: merged(model, 4),
    "pruned to 1/2": lambda model: pruned(model, 2),
    "constants for 1/2": lambda model: with_constants(model, 2),
    "rank 1/4": lambda model: low_rank(model, 4),
    "rank 1/8": lambda model: low_rank(model, 8),
}


def gemm(shape: tuple[int, int, int, int, int], num_tokens: int) -> Callable[[], None]:
    """Dense products of the experts' sizes."""
    _, choices, wide, inner, layers = shape
    rows = torch.randn(num_tokens * choices, wide)
    first, second = torch.randn(2 * inner, wide), torch.randn(wide, inner)

    def run() -> None:
        for _ in range(layers):
            (rows @ first.T)[:, :inner] @ second.T

    return run


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


@torch.inference_mode()
def measure(name: str, config: ForwardConfig) -> list[dict[str, Any]]:
    """A row for each arm of a shape."""
    shape = SHAPES[name]
    model = build(shape)
    models = {arm: make(model) for arm, make in ARMS.items()}
    sizes = {arm: footprint(made, expert_layers(made)).bytes["experts"] for arm, made in models.items()}
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for kind, tokens in (("reading", READING), ("writing", WRITING)):
        ids = torch.randint(0, 2048, tokens)
        for arm, made in models.items():
            runs[arm, kind] = lambda made=made, ids=ids: made(input_ids=ids, use_cache=False)
        runs["GEMM", kind] = gemm(shape, tokens[0] * tokens[1])
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(config.rounds):
        for key, run in runs.items():
            best[key] = min(best[key], timed(run))
    return [
        {
            "shape": name,
            "arm": arm,
            "reading": best[arm, "reading"],
            "writing": best[arm, "writing"],
            "expert_bytes": sizes.get(arm),
        }
        for arm in (*ARMS, "GEMM")
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each shape and arm; speeds as multiples of the original's."""
    body = []
    for row in rows:
        original = next(r for r in rows if r["shape"] == row["shape"] and r["arm"] == "original")
        is_base = row["arm"] in ("original", "GEMM")
        kinds = ("reading", "writing")
        speeds = [f"{row[k] * 1e3:.1f} ms" if is_base else f"{original[k] / row[k]:.2f}" for k in kinds]
        size = "" if row["expert_bytes"] is None else f"{row['expert_bytes'] / 1e6:.1f}"
        body.append([row["shape"], row["arm"], *speeds, size])
    return markdown(["shape", "model", "reading", "writing", "experts, MB"], body)


def main(config: ForwardConfig) -> None:
    """Measure, and write file and table."""
    torch.set_num_threads(1)
    rows = []
    for name in SHAPES:
        rows += measure(name, config)
        print(table(rows), flush=True)
    text = json.dumps({"rows": rows}, indent=1) + "\n"
    (config.results / "forward_speed.json").write_text(text, encoding="utf-8")
    document = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(document, "forward_speed", table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(ForwardConfig))
