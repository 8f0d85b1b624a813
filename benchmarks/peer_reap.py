"""One side of `compress_peer.py`, in a process of its own: `python peer_reap.py SIDE JOB.json`.

SIDE is `theirs` (llm-compressor's REAP), `ours` or `ours, sequential` (moekit's), or `forward` (the model
reads the same tokens, and nothing else). `ours, sequential, looking ahead` gives each token what comes after
it to attend to, which a causal model never sees. JOB says what and where; what was measured is written to its
`answer`.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def theirs(job: dict[str, Any]) -> Callable[[], dict[str, list[int]]]:
    """Calibrate, prune each layer behind those before it, and save, by llm-compressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

    # Its load_context imports all of transformers, torchvision included, and ends in the same.
    model: Any = linearize_moe(AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32))
    ids = load_file(job["tokens"])["input_ids"]
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    report = str(Path(job["out"]) / "kept.json")
    sparsity = 1 - job["experts"] / job["num_experts"]

    def work() -> dict[str, list[int]]:
        oneshot(
            model=model,
            dataset=rows,
            recipe=REAPPruningModifier(sparsity=sparsity, report_path=report),
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
            batch_size=job["batch_size"],
            shuffle_calibration_samples=False,
            moe_calibrate_all_experts=False,
            output_dir=job["out"],
        )
        return json.loads(Path(report).read_text(encoding="utf-8"))

    return work


def ours(job: dict[str, Any], *, sequential: bool, ahead: bool) -> Callable[[], dict[str, list[int]]]:
    """Calibrate, plan, apply and save, by moekit."""
    from moekit.compress import METHODS, apply_plan
    from moekit.moe import TokenBlocks, expert_layers, save_checkpoint
    from moekit.scripts.calibrate import record
    from moekit.scripts.sequential import compress_in_sequence

    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    layers, ids = expert_layers(model), load_file(job["tokens"])["input_ids"]
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = not ahead
    blocks = TokenBlocks(ids, torch.ones_like(ids), ("text",) * len(ids))
    options = {"experts": job["experts"], "form": "stock", "protect": False}

    def planned(part: Any, statistics: Any, samples: Any = None) -> Any:
        return METHODS["reap"](part, statistics, **options)

    def work() -> dict[str, list[int]]:
        if sequential:
            size, quiet = job["batch_size"], {"sample_inputs": False, "progress": False}
            plan = compress_in_sequence(model, layers, blocks, planned, batch_size=size, **quiet)[0]
        else:
            plan = planned(layers, record(model, layers, blocks, job["batch_size"]))
            apply_plan(model, plan)
        save_checkpoint(model, job["out"])
        return {layer.name: sorted(group.core for group in layer.groups) for layer in plan.layers}

    return work


def forward(job: dict[str, Any]) -> Callable[[], dict[str, list[int]]]:
    """The model reads the tokens."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    ids = load_file(job["tokens"])["input_ids"]

    @torch.inference_mode()
    def work() -> dict[str, list[int]]:
        for part in ids.split(job["batch_size"]):
            model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)
        return {}

    return work


def main(side: str, job: dict[str, Any]) -> None:
    """Load, then time the work alone."""
    torch.set_num_threads(job["threads"])
    makers = {"theirs": theirs, "forward": forward}
    work = (
        makers[side](job)
        if side in makers
        else ours(job, sequential="sequential" in side, ahead="ahead" in side)
    )
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    kept = work()
    answer = {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak when loaded": loaded * 1024,
        "kept": kept,
    }
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
