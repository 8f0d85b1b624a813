"""The figures: what they show, with which labels, and the same bytes each time."""

import pytest
from moekit.compress.dendrogram import layer_tree
from moekit.compress.figures import (
    fidelity_bars,
    group_dendrogram,
    load_heatmap,
    short_names,
    size_bars,
)
from moekit.moe.figure_style import figure_png, figure_svg

from .report_samples import make_content


def test_short_names_keep_what_differs():
    assert short_names(["model.layers.0.mlp", "model.layers.12.mlp"]) == ["0", "12"]
    assert short_names(["model.layers.0.mlp"]) == ["model.layers.0.mlp"]
    names = ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"]
    assert short_names(names) == ["encoder.block.1.layer.1", "decoder.block.1.layer.2"]


def test_figures_name_their_axes_and_units():
    content = make_content()
    layer = content.layers[0]
    labels = {
        label
        for figure in (
            load_heatmap(content.layers),
            group_dendrogram(layer, layer_tree(layer)),
            size_bars(content.bytes_by_part),
            fidelity_bars(content.domains, content.overall),
        )
        for axes in figure.axes
        for label in (axes.get_xlabel(), axes.get_ylabel())
    }
    assert {
        "expert",
        "layer",
        "1 − similarity",
        "size on disk (MB)",
        "KL from the original (nats/token)",
    } <= labels


def test_bars_show_the_numbers_they_are_given():
    axes = size_bars({"experts": (4_000_000, 1_500_000), "routers": (20_000, 20_000)}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([4.0, 0.02, 1.5, 0.02])


def test_drawing_twice_gives_the_same_bytes():
    domains = make_content().domains
    first, second = (fidelity_bars(domains) for _ in range(2))
    assert figure_png(first) == figure_png(second)
    assert figure_svg(first, "x") == figure_svg(second, "x")
