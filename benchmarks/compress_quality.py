"""What each part of M-SMoE is worth: one-shot merging with the parts taken away one at a time.

    python benchmarks/compress_quality.py --model MODEL --data valid.jsonl.gz --experts 12 8 4

For every number of experts, variant and calibration seed: KL to the original, perplexity and top-1 agreement
on held-out blocks, and accuracy of generated answers. A seed chooses the calibration blocks (and the random
groups); the held-out blocks and questions are the same for all. Writes one JSON file, which grows row by row
and is taken up again where it was left, and the table and the plot that `docs/compress_quality.md` shows.
"""

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from moekit.compress import METHODS, apply_plan, compare_models, task_accuracy
from moekit.moe import expert_layers, load_documents, record_routing, split_blocks, token_blocks
from quality_report import write_tables
from transformers import AutoModelForCausalLM, AutoTokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "M-SMoE": {"method": "m-smoe"},
    "uniform groups": {"method": "m-smoe", "grouping": "uniform"},
    "random groups": {"method": "m-smoe", "grouping": "random"},
    "no alignment": {"method": "m-smoe", "alignment": "none"},
    "equal weights": {"method": "m-smoe", "weighting": "equal"},
    "frequency pruning": {"method": "frequency"},
}
MARKERS = {"tasks": "\nA:", "sentiment": "\nSentiment:", "trec": "\nType:"}


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Compare M-SMoE with its ablations and with frequency pruning."""

    model: str
    """Path or hub id of an SMoE."""
    data: str
    """Held-out text with domains; calibration and evaluation blocks are cut from it and never shared."""
    name: str
    """Of the result files."""
    experts: tuple[int, ...] = (12, 8, 4)
    """Average number of experts to keep in a layer."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the calibration blocks."""
    seq_len: int = 256
    calibration_tokens: int = 32_768
    eval_tokens: int = 16_384
    questions: int = 100
    """Of each domain that asks any."""
    results: Path = Path("benchmarks/results")
    threads: int = 2


def calibrate(model: Any, blocks: Any, config: QualityConfig, seed: int) -> Any:
    """Routing statistics of the blocks that a seed chooses."""
    order = np.random.default_rng(seed).permutation(len(blocks))
    chosen = blocks.select(order[: config.calibration_tokens // config.seq_len].tolist())
    with torch.inference_mode(), record_routing(model) as statistics:
        for batch in chosen.batches(8):
            model(**batch)
    return statistics


def accuracies(model: Any, tokenizer: Any, documents: list[Any], limit: int) -> dict[str, float]:
    """Share of generated answers that are right, by domain."""
    found = {}
    for domain, marker in MARKERS.items():
        asked = [document for document in documents if document.domain == domain][:limit]
        if asked:
            found[domain] = float(np.mean(task_accuracy(model, tokenizer, asked, answer_marker=marker)))
    return found


def measure(original: Any, model: Any, tokenizer: Any, held_out: Any, documents: Any, limit: int) -> dict:
    """All figures of one model against the original."""
    fidelity = compare_models(original, model, held_out, batch_size=8)
    return {
        "kl": fidelity.overall.kl.value,
        "perplexity": fidelity.overall.perplexity_compressed.value,
        "top1_agreement": fidelity.overall.top1_agreement.value,
        "perplexity_by_domain": {d.domain: d.perplexity_compressed.value for d in fidelity.domains},
        "accuracy": accuracies(model, tokenizer, documents, limit),
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write through a temporary file, so that a killed run leaves the last whole one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(config: QualityConfig) -> None:
    """Run what is missing in the result file, then write table and plot."""
    torch.set_num_threads(config.threads)
    path = config.results / f"compress_quality_{config.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    original = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    documents = load_documents(config.data)
    blocks = token_blocks(documents, tokenizer, seq_len=config.seq_len, seed=0)
    pool, held_out = split_blocks(blocks, held_out_tokens=config.eval_tokens, seed=0)
    result = {
        "config": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in asdict(config).items()
            if k not in ("model", "data")
        },
        "num_experts": expert_layers(original)[0].num_experts,
        "original": measure(original, original, tokenizer, held_out, documents, config.questions),
        "rows": [],
    }
    if path.exists() and (old := json.loads(path.read_text()))["config"] == json.loads(
        json.dumps(result["config"])
    ):
        result = old
    done = {(row["variant"], row["experts"], row["seed"]) for row in result["rows"]}
    for seed in config.seeds:
        statistics = calibrate(original, pool, config, seed)
        for experts in config.experts:
            for variant, options in VARIANTS.items():
                if (variant, experts, seed) in done:
                    continue
                start = time.perf_counter()
                model = copy.deepcopy(original)
                settings = {k: v for k, v in options.items() if k != "method"}
                if settings.get("grouping") == "random":
                    settings["seed"] = seed * 1000
                plan = METHODS[options["method"]](
                    expert_layers(model), statistics, experts=experts, **settings
                )
                apply_plan(model, plan)
                seconds = time.perf_counter() - start
                figures = measure(original, model, tokenizer, held_out, documents, config.questions)
                row = {"variant": variant, "experts": experts, "seed": seed, "seconds": seconds, **figures}
                result["rows"].append(row)
                save(path, result)
                print(
                    f"{variant:18} {experts:3} seed {seed}: KL {row['kl']:.3f} ppl {row['perplexity']:.2f}",
                    flush=True,
                )
    write_tables(path, result)


if __name__ == "__main__":
    main(tyro.cli(QualityConfig))
