"""The tree of a layer's experts by similarity, and a compact SVG of it over the experts' load.

An SVG with one path per colour keeps a report on 48 layers of 128 experts small, which matplotlib's own SVG
(an element with its style for each line and label) does not.
"""

# Dimensions: experts E.

import html
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from .report_content import LayerReport

# Paul Tol's "bright" scheme without its grey: told apart with the common kinds of colour blindness.
GROUP_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
ALONE, REMOVED = -1, -2

_TREE_HEIGHT, _LABEL_HEIGHT, _BAR_HEIGHT, _MARGIN = 150, 30, 70, 46


@dataclass(frozen=True, slots=True)
class Link:
    """One merge of the tree: a bracket from two children up to the height of the merge."""

    left: tuple[float, float]
    """Position along the leaves and height of the left child."""
    right: tuple[float, float]
    """The same of the right child."""
    height: float
    """Distance (1 - similarity) at which the two are joined."""
    leaves: tuple[int, ...]
    """Experts below the merge."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Average-linkage tree of E experts: leaves stand at 0, 1, ... E - 1 in `order`."""

    order: list[int]
    """Experts from left to right."""
    links: list[Link]
    """E - 1 merges, lowest first."""
    linkage: NDArray[np.float64]
    """[E - 1, 4] rows of scipy's `linkage`: first, second, distance, size."""


def expert_tree(similarity_EE: ArrayLike) -> Tree:
    """Cluster experts by average linkage on the distance 1 - similarity.

    The matrix is made symmetric first; an entry that is not finite (an expert that saw nothing) counts as 0,
    and a similarity above 1 as 1.

    Args:
        similarity_EE: similarity of at least two experts, 1 for equal ones.

    Raises:
        ValueError: the matrix is not square or holds fewer than two experts.
    """
    matrix_EE = np.asarray(similarity_EE, dtype=np.float64)
    if matrix_EE.ndim != 2 or len(matrix_EE) != matrix_EE.shape[1] or len(matrix_EE) < 2:
        raise ValueError(f"similarity is {matrix_EE.shape}, not a square matrix over 2 or more experts")
    rows = linkage(squareform(_distance(matrix_EE), checks=False), method="average")
    order = [int(leaf) for leaf in leaves_list(rows)]
    return Tree(order, _links(rows, order), rows)


def _distance(similarity_EE: Float[NDArray, "E E"]) -> Float[NDArray, "E E"]:
    """Symmetric distance 1 - similarity with a zero diagonal."""
    finite_EE = np.nan_to_num(similarity_EE, nan=0.0, posinf=1.0, neginf=0.0)
    distance_EE = np.clip(1 - (finite_EE + finite_EE.T) / 2, 0, None)
    np.fill_diagonal(distance_EE, 0)
    return distance_EE


def _links(rows: NDArray[np.float64], order: list[int]) -> list[Link]:
    """Walk the merges from the lowest up; no recursion, which a chain of 1000 experts would exhaust."""
    tops: dict[int, tuple[float, float]] = {expert: (float(x), 0.0) for x, expert in enumerate(order)}
    below: dict[int, tuple[int, ...]] = {expert: (expert,) for expert in order}
    links = []
    for index, (first, second, height, _) in enumerate(rows):
        left, right = sorted((int(first), int(second)), key=lambda node: tops[node][0])
        node = len(order) + index
        below[node] = below[left] + below[right]
        links.append(Link(tops[left], tops[right], float(height), below[node]))
        tops[node] = ((tops[left][0] + tops[right][0]) / 2, float(height))
    return links


def leaf_order(layer: LayerReport, tree: Tree | None) -> list[int]:
    """Experts from left to right: as in the tree, or group by group if the layer has no similarity."""
    if tree is not None:
        return tree.order
    return [expert for members in layer.groups().values() for expert in members] + layer.removed()


def colour_indices(layer: LayerReport, order: list[int]) -> dict[int, int]:
    """Index into `GROUP_COLOURS` for each expert, or `ALONE` / `REMOVED`.

    Groups of two and more take the colours in turn along `order`, so that neighbours differ; a colour returns
    after six groups.
    """
    sizes = Counter(group for group in layer.group_of if group is not None)
    taken: dict[int, int] = {}
    colours = {}
    for expert in order:
        group = layer.group_of[expert]
        if group is None:
            colours[expert] = REMOVED
        elif sizes[group] == 1:
            colours[expert] = ALONE
        else:
            colours[expert] = taken.setdefault(group, len(taken) % len(GROUP_COLOURS))
    return colours


def link_colour(layer: LayerReport, link: Link, colours: dict[int, int]) -> int:
    """Colour of the group if all experts below the merge are in it, else `ALONE`."""
    groups = {layer.group_of[expert] for expert in link.leaves}
    return colours[link.leaves[0]] if len(groups) == 1 and None not in groups else ALONE


def layer_tree(layer: LayerReport) -> Tree | None:
    """Tree of a layer, or None if there is no similarity or nothing to join."""
    return None if layer.similarity is None or layer.num_experts < 2 else expert_tree(layer.similarity)


def layer_svg(layer: LayerReport, tree: Tree | None) -> str:
    """Draw one layer: the tree (if any), a label for each expert, and a bar for each expert's load.

    Colours are CSS classes (`g0` ... `g5`, `alone`, `removed`), so that a page can show it light or dark.
    """
    order = leaf_order(layer, tree)
    colours = colour_indices(layer, order)
    step = min(34.0, max(7.3, 860 / layer.num_experts))
    top = _TREE_HEIGHT if tree is not None else 0
    width, height = _MARGIN + step * layer.num_experts + 10, top + _LABEL_HEIGHT + _BAR_HEIGHT + 30
    css = "layer dense" if step < 9 else "layer"
    parts = [
        f'<svg class="{css}" viewBox="0 -8 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        f'role="img" aria-label="Experts of {html.escape(layer.name)} by similarity and load">'
    ]
    if tree is not None:
        parts.append(_tree_paths(layer, tree, colours, step))
    parts.append(_labels_and_bars(layer, order, colours, step, top))
    return "".join(parts) + "</svg>"


def _css_class(colour: int) -> str:
    return {ALONE: "alone", REMOVED: "removed"}.get(colour, f"g{colour}")


def _tree_paths(layer: LayerReport, tree: Tree, colours: dict[int, int], step: float) -> str:
    """One path for each colour, and an axis of distance."""
    highest = max(tree.links[-1].height, 1e-12)

    def point(position: int | float, height: int | float) -> tuple[float, float]:
        return _MARGIN + (position + 0.5) * step, _TREE_HEIGHT - (_TREE_HEIGHT - 10) * height / highest

    paths: dict[str, list[str]] = {}
    for link in tree.links:
        (x1, y1), (x2, y2) = point(*link.left), point(*link.right)
        top = point(0, link.height)[1]
        bracket = f"M{x1:.1f} {y1:.1f}V{top:.1f}H{x2:.1f}V{y2:.1f}"
        paths.setdefault(_css_class(link_colour(layer, link, colours)), []).append(bracket)
    drawn = [f'<path class="tree {name}" d="{"".join(brackets)}"/>' for name, brackets in paths.items()]
    for share in (0, 0.5, 1):
        y = point(0, share * highest)[1]
        drawn.append(f'<path class="axis" d="M{_MARGIN - 5} {y:.1f}h5"/>')
        drawn.append(f'<text class="tick end" x="{_MARGIN - 8}" y="{y + 3:.1f}">{share * highest:.2g}</text>')
    turned = f"translate(9 {_TREE_HEIGHT / 2}) rotate(-90)"
    drawn.append(f'<text class="tick mid" transform="{turned}">1 − similarity</text>')
    return "".join(drawn)


def _labels_and_bars(
    layer: LayerReport, order: list[int], colours: dict[int, int], step: float, top: int
) -> str:
    """Number of each expert with its mark (dead, too few), and its load against the fair share 1/E."""
    base = top + _LABEL_HEIGHT + _BAR_HEIGHT
    fair = 1 / layer.num_experts
    scale = _BAR_HEIGHT / max(max(layer.usage), 2 * fair)
    upright = step >= 20
    parts = []
    for position, expert in enumerate(order):
        middle = _MARGIN + (position + 0.5) * step
        bar = layer.usage[expert] * scale
        mark = _mark(layer, expert)
        css = f"leaf {'mid' if upright else 'end'} {mark}"
        place = f"{middle:.1f} {top + 14}" if upright else f"{middle + 3:.1f} {top + 4})rotate(-90"
        parts.append(
            f'<g class="{_css_class(colours[expert])}"><title>{_tooltip(layer, expert, mark)}</title>'
            f'<text class="{css}" transform="translate({place})">{expert}</text>'
            f'<path d="M{middle - step * 0.38:.1f} {base}v-{bar:.1f}h{step * 0.76:.1f}v{bar:.1f}z"/></g>'
        )
    right, level = _MARGIN + step * layer.num_experts, base - fair * scale
    parts.append(f'<path class="fair" d="M{_MARGIN} {level:.1f}H{right:.1f}"/>')
    parts.append(f'<path class="axis" d="M{_MARGIN} {base}H{right:.1f}"/>')
    parts.append(f'<text class="tick end" x="{_MARGIN - 8}" y="{level + 3:.1f}">{fair:.1%}</text>')
    parts.append(f'<text class="tick end" x="{_MARGIN - 8}" y="{base + 3}">0</text>')
    legend = "share of the layer’s selections; dashed: the fair share"
    parts.append(f'<text class="tick" x="{_MARGIN}" y="{base + 16}">{legend}</text>')
    return "".join(parts)


def _mark(layer: LayerReport, expert: int) -> str:
    """CSS class of an expert that cannot be judged: "dead", "few" or none."""
    if expert in layer.dead:
        return "dead"
    return "few" if expert in layer.too_few else ""


def _tooltip(layer: LayerReport, expert: int, mark: str) -> str:
    group = layer.group_of[expert]
    fate = "removed" if group is None else f"group {group}"
    note = {"dead": ", dead", "few": ", too few tokens to judge"}.get(mark, "")
    return f"expert {expert}, {fate}: {layer.usage[expert]:.2%} of selections{note}"
