"""The tree of experts: the order of merges, the colours of groups, the drawing."""

import numpy as np
import pytest
from moekit.compress.dendrogram import GROUP_COLOURS, colour_indices, expert_tree, layer_svg, layer_tree
from moekit.compress.report_content import LayerReport

from .report_samples import make_layer


def test_tree_joins_the_most_alike_first():
    similarity = [[1.0, 0.9, 0.2], [0.9, 1.0, 0.4], [0.2, 0.4, 1.0]]
    tree = expert_tree(similarity)
    first, last = tree.links
    assert set(first.leaves) == {0, 1}
    assert first.height == pytest.approx(0.1)
    assert set(last.leaves) == {0, 1, 2}
    assert last.height == pytest.approx((0.8 + 0.6) / 2)
    places = sorted(position for position, _ in (first.left, first.right))
    assert {last.left[0], last.right[0]} == {sum(places) / 2, ({0, 1, 2} - set(places)).pop()}


def test_tree_survives_missing_similarities_and_long_chains():
    assert len(expert_tree(np.full((4, 4), np.nan)).links) == 3
    places = np.cumsum(1.001 ** np.arange(1500))  # each joins the chain of all before it
    chain = 1 - np.abs(places[:, None] - places[None]) / places[-1]
    assert sorted(expert_tree(chain).order) == list(range(1500))


@pytest.mark.parametrize("bad", [np.ones((2, 3)), np.ones((1, 1)), np.ones(4)])
def test_tree_refuses_what_is_not_square(bad):
    with pytest.raises(ValueError, match="not a square matrix"):
        expert_tree(bad)


def test_colours_follow_groups():
    layer = LayerReport(
        name="m", num_experts=6, num_kept=3, usage=[1 / 6] * 6, group_of=[0, 1, 0, 1, 2, None]
    )
    colours = colour_indices(layer, list(range(6)))
    assert colours[0] == colours[2] != colours[1] == colours[3]
    assert {colours[0], colours[1]} <= set(range(len(GROUP_COLOURS)))
    assert colours[4] < 0
    assert colours[5] < 0
    assert colours[4] != colours[5]


def test_svg_has_a_label_and_a_bar_for_each_expert():
    layer = make_layer("m", 16, 8)
    svg = layer_svg(layer, layer_tree(layer))
    assert svg.count("<title>expert ") == 16
    assert svg.count('class="tree') >= 2
    assert "dead" in svg
