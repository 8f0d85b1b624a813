"""The look of all figures, and figures as PNG or as SVG that follows a page's colours.

Figures are drawn without pyplot and nothing global: data in, a `Figure` out, bytes or text at the end.
"""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

INK, MUTED, GRID, BEFORE, AFTER, BAD = "#1b1f24", "#667080", "#d9dde3", "#a3acb9", "#4477aa", "#d1495b"
_CSS_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BEFORE: "before", AFTER: "after", BAD: "bad"}
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """The look of all figures; matplotlib reads some of it when drawing and some when saving."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield


def plain(text: str) -> str:
    """A user's string as literal text: matplotlib would read dollar signs as mathematics."""
    return text.replace("$", r"\$")


def figure_png(figure: Figure, dpi: int = 120) -> bytes:
    """Render a figure to PNG on white."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="#ffffff")
    return buffer.getvalue()


def figure_svg(figure: Figure, label: str) -> str:
    """Render a figure to an `<svg>` element, for a page whose style sheet defines --ink, --muted, --grid, ...

    Args:
        figure: the figure.
        label: what it shows, for screen readers.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with styled():
        mpl.rcParams["svg.hashsalt"] = label
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    drawn = buffer.getvalue()
    opening, rest = drawn[drawn.index("<svg ") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    for colour, variable in _CSS_VARIABLES.items():
        rest = rest.replace(colour, f"var(--{variable})")
    rest = rest.replace("'DejaVu Sans'", "system-ui")
    width = round(figure.get_figwidth() * 96)
    return (
        f'<svg class="figure" role="img" aria-label="{html.escape(label)}" style="max-width:{width}px" '
        f'{view_box[0] if view_box else ""} xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    )
