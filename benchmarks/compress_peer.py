"""REAP by moekit and by llm-compressor: the same experts? And time and memory, beside a bare forward.

    python3 -m venv peer && peer/bin/pip install llmcompressor
    python benchmarks/compress_peer.py --peer-python peer/bin/python --data valid.jsonl.gz --models MODEL ...

Both get the same checkpoint, calibration tokens, batches, dtype (float32) and number of experts. Loading
and imports are not timed; calibration, plan, pruning and saving are. Rounds alternate. llm-compressor prunes
a layer before it calibrates the next, as `--sequential on` does. Its traced pipeline was found to lose the
causal mask; whether that explains other choices of experts is tried by letting ours look ahead too.

Writes `benchmarks/results/compress_peer.json`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from moekit.moe import load_documents, token_blocks
from moekit.scripts.prepare import bundled_folder
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

OURS = ("ours", "ours, sequential", "ours, sequential, looking ahead")
SIDES = ("theirs", *OURS, "forward")


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """Run both."""

    peer_python: str
    """Of the environment in which llm-compressor is installed."""
    data: str
    """Text to calibrate on."""
    models: tuple[str, ...] = (str(bundled_folder()),)
    sequences: int = 64
    seq_len: int = 256
    batch_size: int = 8
    rounds: int = 3
    threads: int = 1
    results: Path = Path("benchmarks/results/compress_peer.json")


def write_tokens(config: PeerConfig, model: str, path: Path) -> None:
    """Sequences without padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    blocks = token_blocks(load_documents(config.data), tokenizer, seq_len=config.seq_len, seed=0)
    ids = blocks.input_ids[blocks.attention_mask.bool().all(-1)][: config.sequences]
    save_file({"input_ids": ids.contiguous()}, path)


def run(config: PeerConfig, side: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side in its own process."""
    python = config.peer_python if side == "theirs" else sys.executable
    with tempfile.TemporaryDirectory(dir=folder) as out:
        named = {"out": out, "answer": str(folder / "answer.json")}
        (folder / "job.json").write_text(json.dumps(job | named), encoding="utf-8")
        command = [python, str(Path(__file__).with_name("peer_reap.py")), side, str(folder / "job.json")]
        environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{side} failed: {done.stderr[-4000:]}")
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def compare(config: PeerConfig, model: str, folder: Path) -> dict[str, Any]:
    """All sides on one model."""
    counts: Any = AutoConfig.from_pretrained(model)
    number = getattr(counts, "num_experts", None) or counts.num_local_experts
    job: dict[str, Any] = {"model": str(Path(model).absolute()), "tokens": str(folder / "tokens.safetensors")}
    job |= {"num_experts": number, "experts": number // 2}
    job |= {"batch_size": config.batch_size, "threads": config.threads}
    write_tokens(config, model, folder / "tokens.safetensors")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(config.rounds):
        for side in SIDES:
            found[side].append(run(config, side, job, folder))
            print(Path(model).name, number, side, f"{found[side][-1]['processor']:.1f} s", flush=True)
    return {"model": Path(model).name, "experts": job["experts"], **summary(found)}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, ratios of each round, and how many of the kept experts are the same."""
    keys = ("wall", "processor", "peak", "peak when loaded")
    medians = {
        s: {key: statistics.median(row[key] for row in rows) for key in keys} for s, rows in found.items()
    }

    def ratios(side: str, other: str) -> list[float]:
        rounds = zip(found[side], found[other], strict=True)
        return [mine["processor"] / theirs["processor"] for mine, theirs in rounds]

    kept = {side: {name: set(ids) for name, ids in found[side][0]["kept"].items()} for side in SIDES[:-1]}
    total = sum(len(ids) for ids in kept["theirs"].values())
    return {
        "medians": medians,
        "share of their time": {side: ratios(side, "theirs") for side in OURS},
        "times a bare forward": {side: ratios(side, "forward") for side in SIDES[:-1]},
        "kept by both": {
            side: [sum(len(ids & kept["theirs"][name]) for name, ids in kept[side].items()), total]
            for side in OURS
        },
    }


def main(config: PeerConfig) -> None:
    """Compare on each model."""
    rows = []
    for model in config.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(config, model, Path(folder)))
        print(json.dumps(rows[-1], indent=1))
    config.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(PeerConfig))
