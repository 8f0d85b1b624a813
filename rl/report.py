"""Write the report of a training: one HTML page that stands alone, and its pictures as PNG."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..moe.figure_style import figure_png, figure_svg
from ..moe.html_page import (
    cards,
    facts_table,
    note,
    number,
    page,
    section,
    table,
    table_row,
    text,
    warning_list,
)
from .entropy_law import EntropyLaw
from .report_content import (
    Row,
    ends,
    entropy_law,
    first_and_last,
    law_pairs,
    pass_names,
    points,
    signs_of_collapse,
    verdict,
)
from .report_figures import draw_entropy_law, draw_panels, panels

PAGE_FILE = "report.html"
SHOWN_FIRST, SHOWN_LAST = 4, 8
"""Completions from the beginning and from the end of the training."""
TRUSTED_FIT = 0.5
"""R² from which the fitted law is taken at its word."""
LONGEST_TEXT = 3000
"""Characters of a prompt or a completion."""
_EVALUATED = {
    "eval_reward": ("reward", "{:.3f}"),
    "eval_distinct": ("distinct completions of a prompt", "{:.1%}"),
    "eval_distinct_correct": ("different right completions of a prompt", "{:.2f}"),
    "eval_length": ("tokens of a completion", "{:,.1f}"),
    "eval_truncated": ("at the length limit", "{:.1%}"),
}
_NOTES = {
    "Reward and accuracy": "pass@k: the share of problems that one of k completions solves, by the unbiased "
    "estimate. Faint: each step; strong: the moving mean.",
    "Signs of collapse": "Entropy falls where the covariance is above 0: likely tokens are made likelier. A "
    "policy without entropy writes one completion over and over and learns no more.",
    "Completions and updates": "Clipped tokens: the importance ratio has left the trust region, on the side "
    "where the loss no longer pushes.",
    "Experts": "Means over the layers. A fair share is 1: all experts equally busy.",
}
_STYLE = """summary { display: flex; flex-wrap: wrap; gap: 4px 18px; }
"""


def write_rl_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    history: Sequence[Row],
    completions: Sequence[Row] = (),
    facts: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `figures/*.png` into a folder, which may hold other files.

    The page runs no script and requests nothing. A report that is there already is replaced.

    Args:
        folder: Where to; made if it is missing.
        title: Heading.
        history: Rows with ``step`` and metrics, under the names of `step_metrics`; those of an evaluation
            begin with ``eval_``. What no row has is not shown.
        completions: Rows with ``step``, ``prompt``, ``completion`` and ``reward``; some of them are shown.
        facts: Settings, data and whatever else the reader should know.
        warnings: What the reader must know first; signs of a collapse are added.

    Returns:
        The path of the page.
    """
    law = entropy_law(history)
    drawn = {heading: draw_panels(chosen, history) for heading, chosen in panels(history).items()}
    figures = {heading: figure for heading, figure in drawn.items() if figure is not None}
    if law is not None:
        figures["Entropy law"] = draw_entropy_law(law_pairs(history), law)
    sections = [
        section("What happened", f"<p>{text(' '.join(verdict(history)))}</p>", "verdict"),
        warning_list([*warnings, *signs_of_collapse(history)]),
        _cards(history),
        *(_pictures(heading, figures.get(heading)) for heading in drawn),
        section("Entropy and accuracy", _law(law, figures.get("Entropy law"))),
        section("Before and after", _evaluations(history)),
        section("Completions", _completions(completions)),
        section("How it was made", facts_table(facts)),
    ]
    html = page(
        title, [f"{name}: {facts[name]}" for name in ("policy", "method") if name in facts], sections, _STYLE
    )
    target = Path(folder)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for heading, figure in figures.items():
        figure.set_layout_engine("none")  # the page has laid it out already
        name = heading.lower().replace(" ", "_")
        _write(target / "figures" / f"{name}.png", figure_png(figure))
    _write(target / PAGE_FILE, html.encode())
    return target / PAGE_FILE


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


def _cards(history: Sequence[Row]) -> str:
    entries = []
    accuracies = {name: (name.removeprefix("eval_"), "{:.1%}", "held out") for name in pass_names(history)}
    ks = list(accuracies)
    shown = {
        "reward": ("Reward", "{:.3g}", "training"),
        **{name: accuracies[name] for name in dict.fromkeys(ks[:1] + ks[-1:])},
        "entropy": ("Policy entropy", "{:.3g}", "nats per token"),
        "completions/distinct": ("Distinct completions", "{:.0%}", "of a prompt"),
        "completions/mean_length": ("Length", "{:,.0f}", "tokens"),
    }
    for name, (label, pattern, unit) in shown.items():
        found = points(history, name)
        if pair := first_and_last(found) if name.startswith("eval_") else ends(found):
            before, after = (number(value, pattern) for value in pair)
            entries.append((text(label), after, f"{unit}, from {before}"))
    return cards(entries)


def _pictures(heading: str, figure: Figure | None) -> str:
    if figure is None:
        return section(heading, "<p>Not measured.</p>")
    return section(heading, figure_svg(figure, heading) + note(text(_NOTES[heading])))


def _law(law: EntropyLaw | None, figure: Figure | None) -> str:
    if law is None or figure is None:
        return "<p>Not known: it takes three evaluations on held-out prompts, at different entropies.</p>"
    fit = (
        f"Fitted to {law.num_points} evaluations: R = −a exp(H) + b, a = {law.a:.3g}, b = {law.b:.3g}, "
        f"R² = {number(law.r_squared, '{:.3f}')}."
    )
    if law.a > 0 and law.r_squared >= TRUSTED_FIT:
        words = f"Accuracy is bought with entropy. When all is used up, the law foretells {law.ceiling:.1%}."
    else:
        words = "This training does not follow the law, which foretells nothing here."
    source = "It was found for trainings without terms that keep entropy up (arXiv:2505.22617)."
    words = f"{fit} {words} {source}"
    return figure_svg(figure, "Accuracy over entropy") + note(text(words))


def _evaluations(history: Sequence[Row]) -> str:
    shown = {name: (name.removeprefix("eval_"), "{:.1%}") for name in pass_names(history)} | _EVALUATED
    rows = []
    for name, (label, pattern) in shown.items():
        found = points(history, name)
        if pair := first_and_last(found):
            best = max(found, key=lambda point: point[1])
            cells = (text(label), *(number(value, pattern) for value in pair))
            rows.append(table_row((*cells, f"{number(best[1], pattern)} (step {best[0]:,})")))
    if not rows:
        return "<p>Not measured: no prompts were held out.</p>"
    return table(("Held-out prompts", "First", "Last", "Highest"), rows)


def _completions(completions: Sequence[Row]) -> str:
    if not completions:
        return "<p>None were kept.</p>"
    if len(completions) > SHOWN_FIRST + SHOWN_LAST:
        completions = [*completions[:SHOWN_FIRST], *completions[-SHOWN_LAST:]]
    remark = note("The first and the last that were kept; not chosen for their quality.")
    return remark + "".join(map(_completion, completions))


def _completion(row: Row) -> str:
    reward = row.get("reward")
    earned = "no reward" if reward is None else f"reward {number(reward, '{:.3g}')}"
    start = " ".join(str(row["completion"]).split())[:70]
    spans = {"name": f"step {row['step']:,}", "": earned, "sub": text(start)}
    summary = "".join(f"<span class='{css_class}'>{shown}</span>" for css_class, shown in spans.items())
    return (
        f"<details><summary>{summary}</summary><pre>{text(_cut(row['prompt']))}</pre>"
        f"<pre>{text(_cut(row['completion']))}</pre></details>"
    )


def _cut(whole: object) -> str:
    shown = str(whole)
    if len(shown) <= LONGEST_TEXT:
        return shown
    return f"{shown[:LONGEST_TEXT]} … ({len(shown):,} characters)"
