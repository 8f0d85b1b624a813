"""Write the report of a compression run: one HTML page, the same numbers as JSON, and the pictures as PNG."""

# Dimensions: experts E.

import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..moe.figure_style import figure_png
from .dendrogram import Tree, layer_tree
from .figures import fidelity_bars, group_dendrogram, load_heatmap, size_bars
from .report_content import Comparison, DomainRow, LayerReport, ReportContent, verdict
from .report_html import report_html

__all__ = ["Comparison", "DomainRow", "LayerReport", "ReportContent", "report_dict", "write_report"]

logger = logging.getLogger(__name__)


def write_report(folder: str | os.PathLike[str], content: ReportContent) -> Path:
    """Write `report.html`, `report.json` and `figures/*.png` into a folder, which may hold other files.

    Everything is drawn into a hidden folder first and then renamed into place, so that a failure leaves the
    target as it was. The page stands alone: styles and figures are inside, it runs no script and requests
    nothing. A report that is there already is replaced.

    Args:
        folder: where to write; made if it is missing.
        content: what to say.

    Returns:
        The path of `report.html`.
    """
    target = Path(folder)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=".report-") as staging:
            _draw(Path(staging), content)
            _move_into_place(Path(staging), target)
    except BaseException:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        raise
    logger.info("wrote the report to %s", target / "report.html")
    return target / "report.html"


def _draw(staging: Path, content: ReportContent) -> None:
    """Write all files of the report into an empty folder."""
    trees = [layer_tree(layer) for layer in content.layers]
    (staging / "figures").mkdir()
    for name, figure in _figures(content, trees):
        (staging / "figures" / f"{name}.png").write_bytes(figure_png(figure))
    numbers = json.dumps(report_dict(content, trees), indent=1, allow_nan=False, ensure_ascii=False)
    (staging / "report.json").write_text(numbers + "\n", encoding="utf-8")
    (staging / "report.html").write_text(report_html(content, trees), encoding="utf-8")


def _figures(content: ReportContent, trees: Sequence[Tree | None]) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the drawing of each PNG, one at a time: 48 open figures would hold much memory."""
    if content.layers:
        yield "load_heatmap", load_heatmap(content.layers)
    if content.bytes_by_part:
        yield "size_bars", size_bars(content.bytes_by_part)
    if content.domains or content.overall is not None:
        yield "fidelity_bars", fidelity_bars(content.domains, content.overall)
    for index, (layer, tree) in enumerate(zip(content.layers, trees, strict=True)):
        safe_name = re.sub(r"[^A-Za-z0-9_.-]+", "_", layer.name)[-80:]
        yield f"layer_{index:03d}_{safe_name}", group_dendrogram(layer, tree)


def _move_into_place(staging: Path, target: Path) -> None:
    """Rename the drawn files over those of an earlier report; the page, which speaks of them, comes last."""
    figures = target / "figures"
    figures.mkdir(exist_ok=True)
    for stale in figures.glob("layer_[0-9][0-9][0-9]_*.png"):
        stale.unlink()
    for drawn in sorted((staging / "figures").iterdir()):
        drawn.replace(figures / drawn.name)
    for name in ("report.json", "report.html"):
        (staging / name).replace(target / name)


def report_dict(content: ReportContent, trees: Sequence[Tree | None] | None = None) -> dict[str, Any]:
    """All numbers of the report as JSON data, with the verdict.

    A layer's similarity matrix becomes the `linkage` rows that its dendrogram shows (first, second, distance,
    size; as in scipy): E^2 numbers for each layer would dwarf the rest. Numbers that are not finite become
    None.

    Args:
        content: what to say.
        trees: tree of each layer, from `layer_tree`; built here if not given.
    """
    trees = [layer_tree(layer) for layer in content.layers] if trees is None else trees
    layers = []
    for layer, tree in zip(content.layers, trees, strict=True):
        entry = {name: value for name, value in vars(layer).items() if name != "similarity"}
        layers.append({**entry, "linkage": None if tree is None else tree.linkage})
    plain: dict[str, Any] = {"verdict": verdict(content), **vars(content), "layers": layers}
    plain["overall"] = None if content.overall is None else _domain_dict(content.overall)
    plain["domains"] = [_domain_dict(row) for row in content.domains]
    plain["generation"] = [asdict(row) for row in content.generation]
    plain["throughput"] = [asdict(row) for row in content.throughput]
    plain["healing"] = [asdict(row) for row in content.healing]
    plain["gains"] = None if content.gains is None else asdict(content.gains)
    return _json_ready(plain)


def _domain_dict(row: DomainRow) -> dict[str, Any]:
    return {**asdict(row), "perplexity_change": row.perplexity_change}


def _json_ready(value: Any) -> Any:
    """Turn tuples, arrays and numpy numbers into JSON's own types."""
    if isinstance(value, np.ndarray | np.generic):
        return _json_ready(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
