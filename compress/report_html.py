"""The HTML of a compression report: one page without scripts or requests, readable light and dark."""

import math
from collections.abc import Sequence
from importlib import resources

from ..moe.figure_style import figure_svg
from ..moe.html_page import (
    cards,
    facts_table,
    format_bytes,
    format_count,
    note,
    number,
    page,
    section,
    table,
    table_row,
    text,
    warning_list,
)
from .dendrogram import Tree, colour_indices, layer_svg, leaf_order
from .figures import fidelity_bars, load_heatmap, size_bars
from .gain_map import GainMap, gain_figure
from .report_content import Comparison, DomainRow, HealingRow, Interval, LayerReport, ReportContent, verdict

_OPEN_LAYERS = 4  # up to this many layers are shown unfolded


def report_html(content: ReportContent, trees: Sequence[Tree | None]) -> str:
    """Build the whole page.

    Args:
        content: what to show; every string in it is escaped.
        trees: tree of each layer in `content.layers`, from `layer_tree`.
    """
    sections = (
        section("Verdict", f"<p>{text(verdict(content))}</p>", "verdict"),
        warning_list(content.warnings),
        _cards(content),
        _gains(content.gains),
        _healing(content.healing),
        section("What was lost, by domain", _fidelity(content)),
        section("Generated text and speed", _comparisons([*content.generation, *content.throughput])),
        section("Size by part", _sizes(content)),
        section("Expert load", _load(content)),
        section("Layer by layer", _layers(content.layers, trees)),
        section("How it was made", _origin(content)),
    )
    style = resources.files(__package__ or __name__).joinpath("report.css").read_text(encoding="utf-8")
    return page(content.title, _subtitle(content), sections, style)


def _subtitle(content: ReportContent) -> tuple[str, ...]:
    return (
        content.model,
        content.method,
        f"{content.grouping} grouping",
        f"router: {content.router}",
        f"{content.form} form",
    )


def _with_interval(value: float, interval: Interval | None, pattern: str) -> str:
    shown = number(value, pattern)
    if interval is None:
        return shown
    low, high = (number(end, pattern) for end in interval)
    return f"{shown}<span class='ci'>[{low}, {high}]</span>"


def _saved(pair: tuple[int, int]) -> str:
    """Relative change of a pair, "−45%"."""
    before, after = pair
    return "" if not before else number(after / before - 1, "{:+.0%}")


def _coloured(markup: str, difference: int | float, higher_is_better: bool) -> str:
    """Colour a difference that goes the wrong or the right way; its sign says the same without colour."""
    if math.isnan(difference) or difference == 0:
        return markup
    return f"<span class='{'better' if (difference > 0) == higher_is_better else 'worse'}'>{markup}</span>"


def _cards(content: ReportContent) -> str:
    pairs = (
        ("Size on disk", content.num_bytes, format_bytes),
        ("Parameters", content.num_parameters, format_count),
        ("Experts, all layers", content.num_experts(), "{:,}".format),
    )
    entries = [(label, _saved(pair), " → ".join(map(show, pair))) for label, pair, show in pairs]
    overall = content.overall
    if overall is not None:
        change = number(overall.perplexity_change, "{:+.1%}")
        ends = (overall.perplexity_original, overall.perplexity_compressed)
        entries.append(("Perplexity", change, " → ".join(map(number, ends))))
        entries.append(("KL from the original", number(overall.kl, "{:.3f}"), "nats per token"))
        entries.append(("Same top-1 token", number(overall.top1_agreement, "{:.1%}"), "of all positions"))
    return cards(entries)


def _fidelity(content: ReportContent) -> str:
    if content.overall is None and not content.domains:
        return "<p>Not measured: no held-out text was given.</p>"
    head = ("Domain", "Tokens", "Perplexity before", "after", "change", "KL (nats/token)", "Same top-1 token")
    rows = [_domain(row) for row in content.domains]
    if content.overall is not None:
        rows.append(_domain(content.overall, "total"))
    remark = note("Held-out text. In brackets: 95% intervals. KL: compressed from original.")
    picture = figure_svg(fidelity_bars(content.domains, content.overall), "Fidelity by domain")
    return table(head, rows) + remark + picture


def _domain(row: DomainRow, css_class: str = "") -> str:
    change = _with_interval(row.perplexity_change, row.perplexity_change_interval, "{:+.1%}")
    cells = (
        text(row.domain),
        f"{row.num_tokens:,}",
        number(row.perplexity_original),
        number(row.perplexity_compressed),
        _coloured(change, row.perplexity_change, higher_is_better=False),
        _with_interval(row.kl, row.kl_interval, "{:.3f}"),
        _with_interval(row.top1_agreement, row.top1_agreement_interval, "{:.1%}"),
    )
    return table_row(cells, css_class)


def _healing(rows: Sequence[HealingRow]) -> str:
    if not rows:
        return ""
    cells = [(text(row.name), text(row.original), text(row.one_shot), text(row.healed)) for row in rows]
    remark = note("All other sections show the healed model.")
    head = ("Measure", "Original", "One-shot", "Healed")
    return section("What healing has done", table(head, map(table_row, cells)) + remark)


def _gains(gains: GainMap | None) -> str:
    if gains is None:
        return ""
    head = (
        "Cut",
        "To",
        "Weights",
        "Risk of the floor",
        "Quality expected",
        "measured",
        "",
        "One step further",
    )
    rows = [
        table_row(
            (
                str(index),
                text(cut.size),
                format_bytes(cut.num_bytes),
                number(cut.risk, "{:.1%}"),
                number(cut.expected, "{:.3f}"),
                number(cut.quality, "{:.3f}"),
                "kept" if cut.is_kept else "<span class='worse'>taken back</span>",
                text(cut.further),
            )
        )
        for index, cut in enumerate(gains.steps, 1)
    ]
    remark = note(
        f"A cut was allowed if quality would fall below {gains.floor:g} with a probability of at most "
        f"{gains.risk:.1%} (of each cut, not of all together); in the end "
        f"{gains.stop}. Quality is 1 minus the KL from the original, in units "
        "of what the context tells the original of the next token, on the text that decided."
    )
    picture = figure_svg(gain_figure(gains), "Quality against bytes, and what is believed of it")
    return section("How far it could be cut", picture + table(head, rows) + remark)


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "<p>Not measured.</p>"
    head = ("Measure", "n", "Before", "After", "Change")
    remark = note("In brackets: 95% intervals.")
    return table(head, map(_comparison, comparisons)) + remark


def _comparison(row: Comparison) -> str:
    if row.unit == "share":
        pattern, unit = "{:.1%}", ""
        change = number(100 * (row.after - row.before), "{:+.1f}") + " points"
    else:
        pattern = "{:,.0f}" if max(abs(row.before), abs(row.after)) >= 1000 else "{:.4g}"
        unit = f" {text(row.unit)}"
        change = number(row.after / row.before - 1 if row.before else math.nan, "{:+.0%}")
    cells = (
        text(row.name),
        "" if row.count is None else f"{row.count:,}",
        _with_interval(row.before, row.before_interval, pattern) + unit,
        _with_interval(row.after, row.after_interval, pattern) + unit,
        _coloured(change, row.after - row.before, row.higher_is_better),
    )
    return table_row(cells)


def _sizes(content: ReportContent) -> str:
    if not content.bytes_by_part:
        return "<p>Not broken down.</p>"
    rows = []
    for part, sizes in sorted(content.bytes_by_part.items(), key=lambda entry: -max(entry[1])):
        counts = content.parameters_by_part.get(part)
        counted = ("", "") if counts is None else tuple(format_count(count) for count in counts)
        rows.append(table_row((text(part), *counted, *(format_bytes(size) for size in sizes), _saved(sizes))))
    totals = (*map(format_count, content.num_parameters), *map(format_bytes, content.num_bytes))
    rows.append(table_row(("total", *totals, _saved(content.num_bytes)), "total"))
    head = ("Part", "Parameters before", "after", "Size before", "after", "change")
    return figure_svg(size_bars(content.bytes_by_part), "Size by part") + table(head, rows)


def _load(content: ReportContent) -> str:
    if not content.layers:
        return "<p>No MoE layers.</p>"
    remark = note("One row for each MoE layer. Yellow experts work hardest, dark blue ones least.")
    return remark + figure_svg(load_heatmap(content.layers), "Expert load by layer")


def _layers(layers: Sequence[LayerReport], trees: Sequence[Tree | None]) -> str:
    remark = note(
        "Experts that join low in the tree are alike. Colour is the group (grey: alone, "
        "faint: removed; a colour returns after six groups). Struck-out numbers are dead experts, italic "
        "ones saw too few tokens. Below each drawing: its groups, the most used expert of each first."
    )
    return remark + "".join(
        _layer(layer, tree, position == 0 or len(layers) <= _OPEN_LAYERS)
        for position, (layer, tree) in enumerate(zip(layers, trees, strict=True))
    )


def _layer(layer: LayerReport, tree: Tree | None, is_open: bool) -> str:
    counts = ((len(layer.dead), "dead"), (len(layer.too_few), "saw too few"))
    troubles = [f"{count} {word}" for count, word in counts if count]
    most = math.log(layer.num_experts)
    entropy = "" if layer.entropy is None else f"router entropy {layer.entropy:.2f} of {most:.2f} nats"
    summary = (
        f"<span class='name'>{text(layer.name)}</span>"
        f"<span>{layer.num_experts} → {layer.num_kept} experts</span>"
        f"<span class='worse'>{', '.join(troubles)}</span><span class='sub'>{entropy}</span>"
    )
    drawing = f"<div class='scroll'>{layer_svg(layer, tree)}</div>"
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{summary}</summary>{drawing}{_groups(layer, tree)}</details>"


def _groups(layer: LayerReport, tree: Tree | None) -> str:
    """The members of each group, the most used expert first and bold."""
    colours = colour_indices(layer, leaf_order(layer, tree))
    chips, alone = [], []
    for group, (first, *others) in layer.groups().items():
        if not others:
            alone.append(first)
            continue
        members = " ".join((f"<b>{first}</b>", *map(str, others)))
        chips.append(f"<span class='chip g{colours[first]}'><span>{group}: {members}</span></span>")
    rest = (("alone", "alone", sorted(alone)), ("removed", layer.fate, layer.removed()))
    for kind, name, experts in rest:
        if experts:
            listed = " ".join(map(str, experts))
            chips.append(f"<span class='chip {kind}'><span>{name}: {listed}</span></span>")
    return f"<div class='groups'>{''.join(chips)}</div>"


def _origin(content: ReportContent) -> str:
    facts = {
        "Model": content.model,
        "Method": content.method,
        "Grouping": content.grouping,
        "Router": content.router,
        "Form": content.form,
        "Seed": content.seed,
        "Plan hash": content.plan_hash,
        **content.settings,
        "Versions": ", ".join(f"{name} {version}" for name, version in content.versions.items()),
    }
    return f"<pre><code>{text(content.command)}</code></pre>{facts_table(facts)}"
