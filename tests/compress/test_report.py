"""The report: one page that stands alone, the same numbers as JSON, and nothing half-written."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from moekit.compress import report
from moekit.compress.dendrogram import expert_tree, layer_tree
from moekit.compress.report import ReportContent, report_dict, write_report
from moekit.compress.report_html import report_html
from moekit.moe.html_page import format_bytes, format_count

from .report_samples import make_content, make_layer


class Page(HTMLParser):
    """Collects what a page would load, its headings and its open tags."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.open_tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] == "h2":
            self.headings.append(data)


def render(content: ReportContent) -> str:
    return report_html(content, [layer_tree(layer) for layer in content.layers])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    (folder / "model.safetensors").write_bytes(b"weights")
    page = write_report(folder, make_content())
    return folder, page.read_text(encoding="utf-8")


# ---- the page


def test_page_stands_alone(written):
    page = Page(written[1])
    assert "script" not in page.tags
    assert not page.tags & {"link", "iframe", "object", "embed"}
    assert page.loads, "the heat map is an embedded picture"
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not re.search(r"@import|url\((?!#)", written[1])


def test_page_is_well_formed_and_has_every_section(written):
    page = Page(written[1])
    assert page.open_tags == []
    assert page.headings == [
        "Verdict",
        "Warnings",
        "What was lost, by domain",
        "Generated text and speed",
        "Size by part",
        "Expert load",
        "Layer by layer",
        "How it was made",
    ]


def test_page_shows_the_numbers(written):
    text = written[1]
    for shown in (
        "16.6 MB → 9.83 MB",
        "+10.1%",
        "0.262",
        "[0.236, 0.293]",
        "87.2%",
        "10,432 tokens/s",
        "+7.0 points",
    ):
        assert shown in text, shown
    assert "3f9a6f1c0d" in text
    assert "prefers-color-scheme: dark" in text


def test_page_follows_the_colour_scheme(written):
    figures = re.findall(r'<svg class="figure".*?</svg>', written[1], flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        assert "var(--ink)" in figure
        assert "#1b1f24" not in figure


NASTY = "<script>alert('x')</script> & \"$x$\""


def test_every_string_is_escaped():
    content = make_content()
    layers = [replace(content.layers[0], name=NASTY)]
    nasty = replace(
        content,
        **dict.fromkeys(
            ("title", "model", "method", "grouping", "router", "form", "command", "plan_hash"), NASTY
        ),
        versions={NASTY: NASTY},
        settings={NASTY: NASTY},
        warnings=[NASTY],
        layers=layers,
        bytes_by_part={NASTY: (10, 5)},
        overall=replace(content.domains[0], domain=NASTY),
        domains=[replace(content.domains[1], domain=NASTY)],
        generation=[replace(content.generation[0], name=NASTY, unit=NASTY)],
        throughput=[replace(content.throughput[0], name=NASTY)],
    )
    text = render(nasty)
    page = Page(text)
    assert "script" not in page.tags
    assert page.open_tags == []
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_what_was_not_measured_is_said():
    content = make_content()
    bare = replace(
        content,
        overall=None,
        domains=(),
        generation=(),
        throughput=(),
        warnings=(),
        bytes_by_part={},
        layers=(),
    )
    text = render(bare)
    assert "Not measured: no held-out text" in text
    assert "What was lost is unknown" in text
    assert "No MoE layers" in text
    assert Page(text).open_tags == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_do_not_break_it(tmp_path, bad):
    content = make_content(1)
    row = replace(content.domains[0], perplexity_compressed=bad, kl=bad, kl_interval=(bad, bad))
    broken = replace(content, overall=row, domains=[row])
    text = write_report(tmp_path, broken).read_text(encoding="utf-8")
    assert ("not a number" if math.isnan(bad) else "∞") in text
    assert json.loads((tmp_path / "report.json").read_text())["overall"]["kl"] is None


def test_ruined_model_stays_readable(tmp_path):
    content = make_content(1)
    row = replace(
        content.domains[0], perplexity_compressed=1e304, perplexity_ratio_interval=(1e300, 1e305), kl=690.0
    )
    text = write_report(tmp_path, replace(content, overall=row, domains=[row])).read_text(encoding="utf-8")
    assert "1.0e+304" in text
    assert not re.search(r"\d{20}", re.sub(r"base64,[^\"]*", "", text))


# ---- JSON


def test_json_holds_the_same_numbers(written):
    content = make_content()
    saved = json.loads((written[0] / "report.json").read_text(encoding="utf-8"))
    assert saved == report_dict(content)
    assert tuple(saved["num_bytes"]) == content.num_bytes
    assert saved["bytes_by_part"]["experts"] == [13_600_000, 6_820_000]
    assert [row["kl"] for row in saved["domains"]] == [row.kl for row in content.domains]
    assert saved["generation"][0]["after_interval"] == [0.08, 0.15]
    for layer, entry in zip(content.layers, saved["layers"], strict=True):
        assert entry["usage"] == list(layer.usage)
        assert entry["group_of"] == list(layer.group_of)
        np.testing.assert_array_equal(entry["linkage"], expert_tree(layer.similarity).linkage)


# ---- files


def test_files_are_written_beside_what_was_there(written):
    folder, _ = written
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["figures", "model.safetensors", "report.html", "report.json"]
    pictures = sorted(folder.joinpath("figures").iterdir())
    assert [path.name for path in pictures] == [
        "fidelity_bars.png",
        "layer_000_model.layers.0.mlp.png",
        "layer_001_model.layers.1.mlp.png",
        "load_heatmap.png",
        "size_bars.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_second_report_replaces_the_first(tmp_path):
    write_report(tmp_path, make_content(2))
    (tmp_path / "figures" / "mine.png").write_bytes(b"kept")
    write_report(tmp_path, replace(make_content(1), title="second"))
    assert "second" in (tmp_path / "report.html").read_text(encoding="utf-8")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {name for name in names if name.startswith("layer_")} == {"layer_000_model.layers.0.mlp.png"}
    assert "mine.png" in names


@pytest.mark.parametrize("fails", ["load_heatmap", "group_dendrogram", "report_html"])
def test_failure_leaves_nothing(tmp_path, monkeypatch, fails):
    def fail(*_):
        raise OSError("no space left on device")

    old = tmp_path / "old"
    old.mkdir()
    (old / "report.html").write_text("the report of before")
    monkeypatch.setattr(report, fails, fail)
    for folder in (old, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            write_report(folder, make_content(1))
    assert not (tmp_path / "new").exists()
    assert [path.name for path in old.iterdir()] == ["report.html"]
    assert (old / "report.html").read_text() == "the report of before"


# ---- sizes


def test_one_layer_of_one_expert(tmp_path):
    content = replace(make_content(1), layers=[make_layer("mlp", 1, 1)])
    text = write_report(tmp_path, content).read_text(encoding="utf-8")
    assert "1 → 1 experts" in text


def test_48_layers_of_128_experts_stay_small():
    text = render(make_content(48, 128))
    assert len(text.encode()) < 3_000_000
    page = Page(text)
    assert page.open_tags == []
    assert text.count("<details>") == 47, "only the first layer is unfolded"


def test_layers_of_different_widths():
    content = replace(make_content(1), layers=[make_layer("a.0", 4, 2), make_layer("a.1", 16, 8)])
    assert "4 → 2 experts" in render(content)


@pytest.mark.parametrize(
    ("count", "shown_bytes", "shown_count"),
    [(999, "999 B", "999"), (16_610_304, "16.6 MB", "16.6 M"), (1_500_000_000_000, "1.5 TB", "1.5 T")],
)
def test_numbers_are_written_short(count, shown_bytes, shown_count):
    assert format_bytes(count) == shown_bytes
    assert format_count(count) == shown_count
