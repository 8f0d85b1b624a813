"""The dual-head paper's claims beside what `distill_digits.py` and `distill_text.py` have measured.

    python benchmarks/distill_claims.py

Means over the seeds ± half the width of the 95 % Student interval; differences are paired by seed. Writes a
table of `docs/distill.md`, from results alone; what the paper says and the verdicts are written by hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tyro
from distill_arms import BASE
from distill_report import ROUNDING, ReportConfig, Row, cell, cosines_of, gains, sets_of
from dropout_report import MISSING, insert_table, markdown

ONE, LINEAR, BOTTLENECK = "BinaryKL-Norm", "dual head, linear", "dual head, bottleneck"
Values = Callable[[list[Row]], list[float]]


@dataclass(frozen=True)
class Claim:
    """A claim, and what speaks for or against it."""

    text: str
    paper: str
    """Numbers of the paper, as far as they are known."""
    measures: dict[str, Values]
    """Of one set, by what they are; several stand below each other."""
    verdict: str


def difference(arm: str, base: str) -> Values:
    """Points of accuracy between two arms."""
    return partial(gains, arm=arm, base=base)


def cosine(where: str, key: str = "cosines") -> Values:
    """Of the gradients of the labels and of BinaryKL on one head."""
    return lambda rows: cosines_of(rows, "BinaryKL", key, where) if key in rows[0] else []


def collapse(measure: str) -> Values:
    """What BinaryKL on the same head adds to a measure of collapse, where that is not 0 for every arm."""

    def found(rows: list[Row]) -> list[float]:
        added = gains(rows, "BinaryKL", value=lambda row: row["collapse"][measure])
        return added if max(map(abs, added)) > ROUNDING else []

    return found


CLAIMS = (
    Claim(
        "labels and a loss of logits on one head are worse than either alone",
        "a figure marks it as failed; no number known",
        {"BinaryKL": difference("BinaryKL", BASE), ONE: difference(ONE, BASE)},
        "not seen: on the average nowhere worse than labels only; the teacher alone was not run",
    ),
    Claim(
        "their gradients contradict each other in the classifier",
        "theory, under neural collapse; no number known",
        {"cosine": cosine("classifier"), "at the end": cosine("classifier", "late_cosines")},
        "not seen: they agree, at the end less; on SST-2 it is open",
    ),
    Claim(
        "and not in the backbone",
        "theory; no number known",
        {"cosine": cosine("backbone"), "at the end": cosine("backbone", "late_cosines")},
        "holds over the training; at its end on SST-2 the contrary",
    ),
    Claim(
        "so the classifier collapses",
        "theory; no number known",
        {"angles": collapse("classifier_angles"), "duality": collapse("duality")},
        "not seen in its angles (less is nearer to a simplex); on texts it is further from the features",
    ),
    Claim(
        "two heads are better than one",
        "0.1 to 0.2 points in most cases, says a reviewer",
        {"linear": difference(LINEAR, ONE), "bottleneck": difference(BOTTLENECK, ONE)},
        "the bottleneck on two of three sets; linear nowhere for certain",
    ),
    Claim(
        "and than other losses on logits",
        "“superior”; below some of them, says a reviewer",
        {"bottleneck, to KL": difference(BOTTLENECK, "KL"), "to DKD": difference(BOTTLENECK, "DKD")},
        "on two of three sets, of which TREC-6 may be the speed of learning",
    ),
    Claim(
        "aligning the gradients helps",
        "no number known",
        {
            "all parameters": difference("dual head, aligned", LINEAR),
            "features": difference("dual head, aligned at features", LINEAR),
        },
        "not seen",
    ),
)


def body(results: dict[str, list[Row]]) -> list[list[str]]:
    """A line for each claim, a column for each set."""
    lines = []
    for claim in CLAIMS:
        cells = []
        for rows in results.values():
            found = {name: cell(measure(rows)) for name, measure in claim.measures.items()}
            cells.append("<br>".join(f"{name} {text}" for name, text in found.items() if text != MISSING))
        lines.append([claim.text, claim.paper, *cells, claim.verdict])
    return lines


def read(config: ReportConfig) -> dict[str, list[Row]]:
    """Results by set."""
    digits, texts = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (config.results / f"distill_{name}.jsonl" for name in ("digits", "text"))
    )
    return {"digits": digits, **sets_of(texts)}


def main(config: ReportConfig) -> None:
    """Write the table."""
    results = read(config)
    table = markdown(["claim", "the paper's number", *results, "verdict"], body(results))
    document = config.document.read_text(encoding="utf-8")
    config.document.write_text(insert_table(document, "distill_claims", table), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
