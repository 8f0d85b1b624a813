"""`moekit inspect`: what a checkpoint holds, how it routes, and what compression would save."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..compress.dendrogram import layer_tree
from ..compress.figures import group_dendrogram, load_heatmap
from ..compress.plan_file import write_atomically
from ..compress.protection import super_experts
from ..compress.report_content import LayerReport
from ..moe.data import check_tokenizer, token_blocks
from ..moe.discovery import expert_layers
from ..moe.documents import load_documents
from ..moe.figure_style import figure_png
from ..moe.footprint import PARTS, expert_bytes, footprint
from ..moe.layer import ExpertLayer
from ..moe.statistics import LayerStatistics, RoutingStatistics
from .calibrate import check_token_ids, record, sequence_length
from .console import is_interactive, show, step
from .inspect_tables import model_tables, routing_table
from .load import ModelSource, load_model, load_tokenizer, open_source, skeleton
from .options import InspectOptions
from .prediction import predict_uniform
from .prepare import check_machine, check_names

SHARES = (0.75, 0.5, 0.25)
"""Of the experts, for which to tell what would be saved."""


def run(options: InspectOptions) -> dict[str, Any]:
    """Inspect a checkpoint.

    Returns:
        Everything shown, as plain data.

    Raises:
        ValueError: The checkpoint or the data cannot be used, or options exclude each other.
    """
    _check_options(options)
    source = open_source(options.model)
    blocks = None
    if options.data is not None:
        tokenizer = load_tokenizer(source)
        check_tokenizer(tokenizer, source.config)
        length = sequence_length(options.seq_len, source.config)
        documents = load_documents(options.data)
        blocks = token_blocks(
            documents, tokenizer, seq_len=length, max_tokens=options.tokens, seed=options.seed
        )
    model = skeleton(source)
    if blocks is not None:
        check_token_ids(blocks, model)
    if options.load_weights:
        step(f"Loading {source.name}")
        model = load_model(source, dtype=options.dtype, device=options.device)
    layers = expert_layers(model)
    facts = describe(source, model, layers, weights=options.load_weights)
    show(*model_tables(facts))
    if blocks is not None:
        step(f"Recording the routing of {blocks.num_tokens:,} tokens")
        statistics = record(model, layers, blocks, options.batch_size, progress=is_interactive())
        facts["routing"] = describe_routing(statistics, options.min_tokens)
        show(routing_table(facts["routing"], options.min_tokens))
        if options.report is not None:
            _write_pictures(options.report, facts, statistics, options.min_tokens)
    if options.json is not None:
        show(f"written: {write_atomically(options.json, _text(facts))}")
    return facts


def _check_options(options: InspectOptions) -> None:
    check_names(options.model, options.data)
    check_machine(options.device, options.seed)
    if options.data is not None and not options.load_weights:
        raise ValueError("--data needs the weights; leave --no-load-weights out")
    if options.report is not None and options.data is None:
        raise ValueError("--report draws how experts are used; name text to run with --data")
    if options.batch_size < 1 or options.min_tokens < 1:
        raise ValueError(
            f"--batch-size {options.batch_size} and --min-tokens {options.min_tokens} must be positive"
        )


def describe(
    source: ModelSource, model: PreTrainedModel, layers: list[ExpertLayer], *, weights: bool
) -> dict[str, Any]:
    """What the checkpoint holds, as plain data."""
    whole = footprint(model, layers)
    idle = sum(
        sum(tensor.numel() for _, tensor in layer.storage.read(0).named_tensors())
        * max(layer.num_physical_experts - layer.top_k, 0)
        for layer in layers
    )
    savings = []
    for share in SHARES:
        smaller, kept = predict_uniform(model, share)
        sizes = {"parameters": smaller.total_parameters, "bytes": smaller.total_bytes}
        savings.append({"share": share, "experts": sum(kept), **sizes})
    return {
        "model": source.name,
        "class": type(model).__name__,
        "family": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": whole.total_parameters,
        "active_parameters": whole.total_parameters - idle,
        "bytes": whole.total_bytes,
        "parts": {part: {"parameters": whole.parameters[part], "bytes": whole.bytes[part]} for part in PARTS},
        "layers": [_describe_layer(layer, weights) for layer in layers],
        "savings": savings,
    }


def _describe_layer(layer: ExpertLayer, weights: bool) -> dict[str, Any]:
    expert = layer.storage.read(0)
    return {
        "name": layer.name,
        "experts": layer.num_experts,
        "physical_experts": layer.num_physical_experts,
        "top_k": layer.top_k,
        "router_mode": layer.router_mode,
        "router": asdict(layer.router_constraints) if weights else None,
        "hidden_size": expert.hidden_size,
        "width": expert.width,
        "gated": expert.gate is not None,
        "expert_bytes": expert_bytes(layer),
    }


def describe_routing(statistics: RoutingStatistics, min_tokens: int) -> list[dict[str, Any]]:
    """How each layer routed, as plain data."""
    outliers = super_experts(statistics)
    rows = []
    for name, layer in statistics.layers.items():
        load_E = layer.usage * layer.num_experts
        rows.append(
            {
                "name": name,
                "tokens": layer.num_tokens,
                "load": {
                    "min": float(load_E.min()),
                    "median": float(load_E.median()),
                    "max": float(load_E.max()),
                },
                "usage": layer.usage.tolist(),
                "dead": layer.dead,
                "too_few": [e for e in layer.too_few(min_tokens) if e not in layer.dead],
                "super_experts": outliers.get(name, []),
                "router_entropy": layer.entropy,
                "load_entropy": layer.load_entropy,
                "strongest_pair": _strongest_pair(layer),
            }
        )
    return rows


def _strongest_pair(layer: LayerStatistics) -> dict[str, Any] | None:
    """The two experts that most often serve the same token; none where a token has one expert."""
    together_EE = layer.coactivation.triu(1)
    if not together_EE.any():
        return None
    first, second = divmod(int(together_EE.argmax()), layer.num_experts)
    share = int(together_EE[first, second]) / max(layer.num_tokens, 1)
    return {"experts": [first, second], "share_of_tokens": share}


def _write_pictures(
    folder: Path, facts: dict[str, Any], statistics: RoutingStatistics, min_tokens: int
) -> None:
    """Draw load and similarity into a folder, with the numbers as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    reports = [
        LayerReport(
            name=name,
            num_experts=layer.num_experts,
            num_kept=layer.num_experts,
            usage=layer.usage.tolist(),
            group_of=list(range(layer.num_experts)),
            similarity=layer.logit_cosine.numpy() if layer.logit_gram.any() else None,
            too_few=[e for e in layer.too_few(min_tokens) if e not in layer.dead],
            dead=layer.dead,
            entropy=layer.entropy,
        )
        for name, layer in statistics.layers.items()
    ]
    (folder / "load_heatmap.png").write_bytes(figure_png(load_heatmap(reports)))
    for index, report in enumerate(reports):
        drawn = group_dendrogram(report, layer_tree(report))
        (folder / f"layer_{index:03d}.png").write_bytes(figure_png(drawn))
    write_atomically(folder / "inspect.json", _text(facts))
    show(f"pictures: {folder}")


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
