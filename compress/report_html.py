"""The HTML of a compression report: one page without scripts or requests, readable light and dark."""

import html
import math
from collections.abc import Iterable, Sequence
from importlib import resources

from .dendrogram import Tree, colour_indices, layer_svg, leaf_order
from .figures import fidelity_bars, figure_svg, load_heatmap, size_bars
from .report_content import Comparison, DomainRow, Interval, LayerReport, ReportContent, verdict

_OPEN_LAYERS = 4  # up to this many layers are shown unfolded


def report_html(content: ReportContent, trees: Sequence[Tree | None]) -> str:
    """Build the whole page.

    Args:
        content: what to show; every string in it is escaped.
        trees: tree of each layer in `content.layers`, from `layer_tree`.
    """
    style = resources.files(__package__ or __name__).joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        (
            f"<header><h1>{_text(content.title)}</h1><p class='sub'>{_subtitle(content)}</p></header>",
            _section("Verdict", f"<p>{_text(verdict(content))}</p>", "verdict"),
            _warnings(content.warnings),
            _cards(content),
            _section("What was lost, by domain", _fidelity(content)),
            _section("Generated text and speed", _comparisons([*content.generation, *content.throughput])),
            _section("Size by part", _sizes(content)),
            _section("Expert load", _load(content)),
            _section("Layer by layer", _layers(content.layers, trees)),
            _section("How it was made", _origin(content)),
        )
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(content.title)}</title><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(heading: str, body: str, css_class: str = "") -> str:
    return f"<section class='{css_class}'><h2>{heading}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th scope='col'>{name}</th>" for name in head)
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='scroll'><table>{body}</table></div>"


def _row(cells: Sequence[str], css_class: str = "") -> str:
    return f"<tr class='{css_class}'>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _subtitle(content: ReportContent) -> str:
    how = (
        content.method,
        f"{content.grouping} grouping",
        f"router: {content.router}",
        f"{content.form} form",
    )
    return " · ".join(_text(fact) for fact in (content.model, *how))


def _warnings(warnings: Sequence[str]) -> str:
    body = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return _section("Warnings", f"<ul>{body}</ul>" if body else "<p>None.</p>", "warnings" if body else "")


def format_bytes(count: int | float) -> str:
    """Bytes in the decimal unit that people read: 16_610_000 is "16.6 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def format_count(count: int | float) -> str:
    """Large counts in short: 8_300_000 is "8.3 M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"


def _number(value: int | float, pattern: str = "{:,.2f}") -> str:
    """A formatted number, or words where there is none."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = pattern.format(value)
    if len(shown) <= 12:
        return shown
    return f"{100 * value:.1e}%" if pattern.endswith("%}") else f"{value:.1e}"


def _signed(value: float, pattern: str) -> str:
    """A change with its sign, a true minus; a change that rounds to nothing has no sign."""
    shown = _number(value, pattern)
    if not any(digit in shown for digit in "123456789∞n"):
        return shown.lstrip("+-")
    return shown.replace("-", "−")


def _with_interval(value: float, interval: Interval | None, pattern: str) -> str:
    show = _signed if "+" in pattern else _number
    shown = show(value, pattern)
    if interval is None:
        return shown
    low, high = (show(end, pattern) for end in interval)
    return f"{shown}<span class='ci'>[{low}, {high}]</span>"


def _saved(pair: tuple[int, int]) -> str:
    """Relative change of a pair, "−45%"."""
    before, after = pair
    return "" if not before else _signed(after / before - 1, "{:+.0%}")


def _coloured(text: str, difference: int | float, higher_is_better: bool) -> str:
    """Colour a difference that goes the wrong or the right way; its sign says the same without colour."""
    if math.isnan(difference) or difference == 0:
        return text
    return f"<span class='{'better' if (difference > 0) == higher_is_better else 'worse'}'>{text}</span>"


def _cards(content: ReportContent) -> str:
    pairs = (
        ("Size on disk", content.num_bytes, format_bytes),
        ("Parameters", content.num_parameters, format_count),
        ("Experts, all layers", content.num_experts(), "{:,}".format),
    )
    cards = [_card(label, _saved(pair), " → ".join(map(show, pair))) for label, pair, show in pairs]
    overall = content.overall
    if overall is not None:
        change = _signed(overall.perplexity_change, "{:+.1%}")
        ends = (overall.perplexity_original, overall.perplexity_compressed)
        cards.append(_card("Perplexity", change, " → ".join(map(_number, ends))))
        cards.append(_card("KL from the original", _number(overall.kl, "{:.3f}"), "nats per token"))
        cards.append(_card("Same top-1 token", _number(overall.top1_agreement, "{:.1%}"), "of all positions"))
    return f"<div class='cards'>{''.join(cards)}</div>"


def _card(label: str, value: str, detail: str) -> str:
    return (
        f"<div class='card'><div class='label'>{label}</div><div class='value'>{value}</div>"
        f"<div class='detail'>{detail}</div></div>"
    )


def _fidelity(content: ReportContent) -> str:
    if content.overall is None and not content.domains:
        return "<p>Not measured: no held-out text was given.</p>"
    head = ("Domain", "Tokens", "Perplexity before", "after", "change", "KL (nats/token)", "Same top-1 token")
    rows = [_domain(row) for row in content.domains]
    if content.overall is not None:
        rows.append(_domain(content.overall, "total"))
    note = "<p class='note'>Held-out text. In brackets: 95% intervals. KL: compressed from original.</p>"
    picture = figure_svg(fidelity_bars(content.domains, content.overall), "Fidelity by domain")
    return _table(head, rows) + note + picture


def _domain(row: DomainRow, css_class: str = "") -> str:
    change = _with_interval(row.perplexity_change, row.perplexity_change_interval, "{:+.1%}")
    cells = (
        _text(row.domain),
        f"{row.num_tokens:,}",
        _number(row.perplexity_original),
        _number(row.perplexity_compressed),
        _coloured(change, row.perplexity_change, higher_is_better=False),
        _with_interval(row.kl, row.kl_interval, "{:.3f}"),
        _with_interval(row.top1_agreement, row.top1_agreement_interval, "{:.1%}"),
    )
    return _row(cells, css_class)


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "<p>Not measured.</p>"
    head = ("Measure", "n", "Before", "After", "Change")
    note = "<p class='note'>In brackets: 95% intervals.</p>"
    return _table(head, map(_comparison, comparisons)) + note


def _comparison(row: Comparison) -> str:
    if row.unit == "share":
        pattern, unit = "{:.1%}", ""
        change = _signed(100 * (row.after - row.before), "{:+.1f}") + " points"
    else:
        pattern = "{:,.0f}" if max(abs(row.before), abs(row.after)) >= 1000 else "{:.4g}"
        unit = f" {_text(row.unit)}"
        change = _signed(row.after / row.before - 1 if row.before else math.nan, "{:+.0%}")
    cells = (
        _text(row.name),
        "" if row.count is None else f"{row.count:,}",
        _with_interval(row.before, row.before_interval, pattern) + unit,
        _with_interval(row.after, row.after_interval, pattern) + unit,
        _coloured(change, row.after - row.before, row.higher_is_better),
    )
    return _row(cells)


def _sizes(content: ReportContent) -> str:
    if not content.bytes_by_part:
        return "<p>Not broken down.</p>"
    rows = []
    for part, sizes in sorted(content.bytes_by_part.items(), key=lambda entry: -max(entry[1])):
        counts = content.parameters_by_part.get(part)
        counted = ("", "") if counts is None else tuple(format_count(count) for count in counts)
        rows.append(_row((_text(part), *counted, *(format_bytes(size) for size in sizes), _saved(sizes))))
    totals = (*map(format_count, content.num_parameters), *map(format_bytes, content.num_bytes))
    rows.append(_row(("total", *totals, _saved(content.num_bytes)), "total"))
    head = ("Part", "Parameters before", "after", "Size before", "after", "change")
    return figure_svg(size_bars(content.bytes_by_part), "Size by part") + _table(head, rows)


def _load(content: ReportContent) -> str:
    if not content.layers:
        return "<p>No MoE layers.</p>"
    note = (
        "<p class='note'>One row for each MoE layer. Yellow experts work hardest, dark blue ones least.</p>"
    )
    return note + figure_svg(load_heatmap(content.layers), "Expert load by layer")


def _layers(layers: Sequence[LayerReport], trees: Sequence[Tree | None]) -> str:
    note = (
        "<p class='note'>Experts that join low in the tree are alike. Colour is the group (grey: alone, "
        "faint: removed; a colour returns after six groups). Struck-out numbers are dead experts, italic "
        "ones saw too few tokens. Below each drawing: its groups, the most used expert of each first.</p>"
    )
    return note + "".join(
        _layer(layer, tree, position == 0 or len(layers) <= _OPEN_LAYERS)
        for position, (layer, tree) in enumerate(zip(layers, trees, strict=True))
    )


def _layer(layer: LayerReport, tree: Tree | None, is_open: bool) -> str:
    counts = ((len(layer.dead), "dead"), (len(layer.too_few), "saw too few"))
    troubles = [f"{count} {word}" for count, word in counts if count]
    most = math.log(layer.num_experts)
    entropy = "" if layer.entropy is None else f"router entropy {layer.entropy:.2f} of {most:.2f} nats"
    summary = (
        f"<span class='name'>{_text(layer.name)}</span>"
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
    for name, experts in (("alone", sorted(alone)), ("removed", layer.removed())):
        if experts:
            listed = " ".join(map(str, experts))
            chips.append(f"<span class='chip {name}'><span>{name}: {listed}</span></span>")
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
    rows = "".join(
        f"<tr><th scope='row'>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items()
    )
    return (
        f"<pre><code>{_text(content.command)}</code></pre><table class='facts'><tbody>{rows}</tbody></table>"
    )
