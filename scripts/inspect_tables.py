"""The tables of `moekit inspect`; they show plain data, which `inspect_model.py` gathers."""

import re
from typing import Any

from rich.table import Table

from ..compress.figures import short_names
from .console import megabytes, millions, table


def model_tables(facts: dict[str, Any]) -> list[str | Table]:
    """The checkpoint in four parts: heading, layers, sizes, savings."""
    total = facts["bytes"]
    sizes = [
        (part, millions(entry["parameters"]), megabytes(entry["bytes"]), f"{entry['bytes'] / total:.1%}")
        for part, entry in facts["parts"].items()
        if entry["bytes"]
    ]
    sizes.append(("all", millions(facts["parameters"]), megabytes(total), "100.0%"))
    savings = [
        (
            f"{entry['share']:.0%} of the experts",
            entry["experts"],
            millions(entry["parameters"]),
            megabytes(entry["bytes"]),
            f"{1 - entry['bytes'] / total:.1%}",
        )
        for entry in facts["savings"]
    ]
    heading = (
        f"{facts['model']}: {facts['class']} ({facts['family']}), {facts['dtype']}, "
        f"{millions(facts['parameters'])} parameters, "
        f"{millions(facts['active_parameters'])} of them active for a token"
    )
    return [
        heading,
        table("MoE layers", ("layers", "experts", "top-k", "expert", "router"), _layer_rows(facts["layers"])),
        table("Where the parameters are", ("part", "parameters", "bytes", "share"), sizes),
        table("What would be saved", ("keep", "experts", "parameters", "bytes", "saved"), savings),
    ]


def _layer_rows(layers: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """One row for all layers that look the same."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        experts = str(layer["experts"])
        if layer["physical_experts"] != layer["experts"]:
            experts = f"{layer['physical_experts']} (router: {layer['experts']})"
        kind = "gated" if layer["gated"] else "plain"
        shape = f"{kind}, {layer['hidden_size']} x {layer['width']}, {megabytes(layer['expert_bytes'])}"
        pattern = re.sub(r"\d+", "*", layer["name"])
        row = (pattern, experts, str(layer["top_k"]), shape, _rule(layer["router"]))
        groups.setdefault(row, []).append(layer["name"])
    return [(joined_names(names), *row[1:]) for row, names in groups.items()]  # pyright: ignore


def _rule(router: dict[str, Any] | None) -> str:
    """A router's rule in a few words."""
    if router is None:
        return "not read"
    words = [router["scoring"]]
    words += ["renormalised"] if router["renormalises"] else []
    words += ["correction bias"] if router["has_correction_bias"] else []
    if router["num_groups"] > 1:
        words.append(f"{router['topk_groups']} of {router['num_groups']} groups")
    return ", ".join(words)


def joined_names(names: list[str]) -> str:
    """One name for many: ``model.layers.{0-3,5}.mlp``."""
    numbers = [re.findall(r"\d+", name) for name in names]
    varying = [i for i in range(len(numbers[0])) if len({row[i] for row in numbers}) > 1]
    if len(varying) != 1:
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    shown = _ranges([int(row[varying[0]]) for row in numbers])
    count = iter(range(len(numbers[0])))
    return re.sub(r"\d+", lambda m: f"{{{shown}}}" if next(count) == varying[0] else m.group(), names[0])


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def routing_table(rows: list[dict[str, Any]], min_tokens: int) -> Table:
    """How each layer routed, for people; load is in units of the fair share."""
    shown = []
    for label, row in zip(short_names([row["name"] for row in rows]), rows, strict=True):
        load, pair = row["load"], row["strongest_pair"]
        cells = [label, f"{load['min']:.2f} / {load['median']:.2f} / {load['max']:.2f}"]
        cells += [str(len(row[what])) for what in ("dead", "too_few")]
        cells += [", ".join(map(str, row["super_experts"])) or "-"]
        cells += [f"{row['router_entropy']:.2f}", f"{row['load_entropy']:.2f}"]
        cells += ["-" if pair is None else "{}+{} {:.0%}".format(*pair["experts"], pair["share_of_tokens"])]
        shown.append(cells)
    title = f"Routing of {rows[0]['tokens']:,} tokens"
    legend = (
        "Load 1 is the fair share of an expert. H is entropy: the router's in nats per token; that of the "
        "load is 1 where all experts are used alike. Super experts have outputs that dwarf all others."
    )
    columns = (
        "layer",
        "load min / median / max",
        "dead",
        f"<{min_tokens} tokens",
        "super",
        "router H",
        "load H",
    )
    return table(title, (*columns, "often together"), shown, caption=legend)
