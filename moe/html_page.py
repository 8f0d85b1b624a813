"""The parts of a report: one HTML page without scripts or requests, readable light and dark.

Strings that are handed in as text are escaped here; what is called markup is HTML already.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources


def page(title: str, subtitle: Iterable[object], sections: Iterable[str], style: str = "") -> str:
    """Build the whole page.

    Args:
        title: Text of the heading.
        subtitle: Texts under it.
        sections: Markup, from top to bottom.
        style: CSS beyond that of all reports.
    """
    shared = resources.files(__package__ or __name__).joinpath("html_page.css").read_text(encoding="utf-8")
    facts = " · ".join(text(fact) for fact in subtitle)
    header = f"<header><h1>{text(title)}</h1><p class='sub'>{facts}</p></header>"
    body = "\n".join((header, *sections))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text(title)}</title><style>{shared}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def text(value: object) -> str:
    """Anything as text that no browser takes for markup."""
    return html.escape(str(value), quote=True)


def section(heading: str, markup: str, css_class: str = "") -> str:
    """A framed part of the page."""
    return f"<section class='{css_class}'><h2>{text(heading)}</h2>{markup}</section>"


def warning_list(warnings: Sequence[str]) -> str:
    """The section of what a reader must know first."""
    items = "".join(f"<li>{text(warning)}</li>" for warning in warnings)
    return section("Warnings", f"<ul>{items}</ul>" if items else "<p>None.</p>", "warnings" if items else "")


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """The figures that matter most: markup of label, value and detail of each."""
    return (
        "<div class='cards'>"
        + "".join(
            f"<div class='card'><div class='label'>{label}</div><div class='value'>{value}</div>"
            f"<div class='detail'>{detail}</div></div>"
            for label, value, detail in entries
        )
        + "</div>"
    )


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    """A table of `table_row` markup; the first column is text, the others numbers."""
    cells = "".join(f"<th scope='col'>{text(name)}</th>" for name in head)
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='scroll'><table>{body}</table></div>"


def table_row(cells: Iterable[str], css_class: str = "") -> str:
    """A row of a table, of markup."""
    return f"<tr class='{css_class}'>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def facts_table(facts: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    rows = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table class='facts'><tbody>{rows}</tbody></table>"


def note(markup: str) -> str:
    """A small remark."""
    return f"<p class='note'>{markup}</p>"


def number(value: int | float, pattern: str = "{:,.2f}") -> str:
    """A formatted number, or words where there is none; with its sign, and a true minus, if `pattern` asks.

    A change that rounds to nothing has no sign.
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = pattern.format(value)
    if len(shown) > 12:
        shown = f"{100 * value:.1e}%" if pattern.endswith("%}") else f"{value:.1e}"
    if "+" not in pattern:
        return shown
    if not any(digit in shown for digit in "123456789"):
        return shown.lstrip("+-")
    return shown.replace("-", "−")


def format_bytes(count: int | float) -> str:
    """Bytes in the decimal unit that people read: 16_610_000 is "16.6 MB"."""
    return _short(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), " B")


def format_count(count: int | float) -> str:
    """Large counts in short: 8_300_000 is "8.3 M"."""
    return _short(count, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)), "")


def _short(count: int | float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    for unit, scale in units:
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}{smallest}"
