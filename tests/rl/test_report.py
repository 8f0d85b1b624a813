"""The report of a training: what it shows, that it stands alone, and that nothing in it becomes markup."""

import math
import re
from html.parser import HTMLParser

import pytest
from moekit.rl.report import write_rl_report
from moekit.rl.report_content import (
    ends,
    entropy_law,
    law_pairs,
    pass_names,
    points,
    signs_of_collapse,
    verdict,
)
from moekit.rl.report_figures import draw_panels, panels

from .report_samples import FACTS, LAW, made_up_completions, made_up_history


class Page(HTMLParser):
    """Collects headings, tags, what would be loaded, and tags that stay open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.open_tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    (folder / "model.safetensors").write_bytes(b"weights")
    page = write_rl_report(
        folder,
        title="Made up",
        history=made_up_history(),
        completions=made_up_completions(),
        facts=FACTS,
        warnings=["a reward failed"],
    )
    return folder, page.read_text(encoding="utf-8")


def test_page_stands_alone_and_is_light(written):
    page = Page(written[1])
    assert page.open_tags == []
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img"}
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not re.search(r"@import|url\((?!#)", written[1])
    assert len(written[1].encode()) < 1_000_000


def test_page_has_every_section_and_the_numbers(written):
    assert Page(written[1]).headings == [
        "What happened",
        "Warnings",
        "Reward and accuracy",
        "Signs of collapse",
        "Completions and updates",
        "Experts",
        "Entropy and accuracy",
        "Before and after",
        "Completions",
        "How it was made",
    ]
    first = LAW.predict(1.1)
    for shown in (f"pass@1 rose from {first:.1%}", "a reward failed", "made up for a test", "foretells 70."):
        assert shown in written[1], shown
    assert "What is 29 + 29?" in written[1]
    assert "What is 15 + 15?" not in written[1], "only the first and the last"


def test_pictures_lie_beside_what_was_there(written):
    folder = written[0]
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "model.safetensors", "report.html"]
    pictures = sorted(folder.joinpath("figures").iterdir())
    assert [path.stem for path in pictures] == [
        "completions_and_updates",
        "entropy_law",
        "experts",
        "reward_and_accuracy",
        "signs_of_collapse",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


NASTY = "<script>alert('x')</script> & \"$x$\""


def test_every_string_is_escaped(tmp_path):
    history = [
        {"step": s, f"rewards/{NASTY}/mean": 0.1, "rewards/b/mean": s / 2, "reward": s} for s in range(3)
    ]
    page = write_rl_report(
        tmp_path,
        title=NASTY,
        history=history,
        completions=[{"step": 1, "prompt": NASTY, "completion": NASTY * 100, "reward": None}],
        facts={NASTY: NASTY, "policy": NASTY},
        warnings=[NASTY],
    )
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "no reward" in text
    assert Page(text).open_tags == []


def test_what_was_not_measured_is_said(tmp_path):
    text = write_rl_report(tmp_path, title="t", history=[], facts={}).read_text(encoding="utf-8")
    for words in ("trained for 0 steps", "Not measured", "no prompts were held out", "None were kept"):
        assert words in text, words
    assert Page(text).open_tags == []
    assert list(tmp_path.joinpath("figures").iterdir()) == []


@pytest.mark.slow
def test_long_histories_stay_light(tmp_path):
    history = made_up_history(5000)
    page = write_rl_report(tmp_path, title="t", history=history, facts=FACTS)
    assert page.stat().st_size < 1_000_000


def test_failure_leaves_the_report_of_before(tmp_path, monkeypatch):
    from moekit.rl import report

    def fail(*_):
        raise OSError("no space left on device")

    (tmp_path / "report.html").write_text("before")
    monkeypatch.setattr(report, "figure_png", fail)
    with pytest.raises(OSError, match="no space"):
        write_rl_report(tmp_path, title="t", history=[{"step": s, "kl": 0.1} for s in (1, 2)], facts={})
    assert (tmp_path / "report.html").read_text() == "before"


# ---- content


def test_points_and_their_ends():
    rows = [{"step": s, "x": float(s)} for s in range(40)]
    rows[3]["x"], rows[4]["x"], rows[5]["x"] = math.nan, None, "text"
    assert len(points(rows, "x")) == 37
    assert ends(points(rows, "x")) == (1.0, 38.0), "means of three values each"
    assert ends(points(rows[:1], "x")) is None
    assert pass_names([{"eval_pass@8": 1, "step": 0, "pass@4": 1, "eval_pass@16": 1}]) == [
        "eval_pass@8",
        "eval_pass@16",
    ]


def test_law_is_found_from_the_history():
    history = made_up_history()
    law = entropy_law(history)
    assert law is not None
    assert law.ceiling == pytest.approx(LAW.ceiling, abs=0.02)
    assert law_pairs(history)[0][:2] == (0, history[1]["entropy"]), "step 0 takes the nearest entropy"
    assert entropy_law(history[:5]) is None


def test_verdict_tells_sharper_from_wider():
    def rows(one, many):
        return [
            {"step": s, "eval_pass@1": a, "eval_pass@8": b}
            for s, (a, b) in enumerate(zip(one, many, strict=True))
        ]

    assert "solves fewer problems in many tries" in " ".join(verdict(rows((0.2, 0.5), (0.8, 0.6))))
    assert "solves more problems in many tries" in " ".join(verdict(rows((0.2, 0.5), (0.6, 0.8))))
    assert "many tries" not in " ".join(verdict(rows((0.2, 0.5), (0.6, 0.605))))
    assert "stayed at 20.0%" in " ".join(verdict(rows((0.2, 0.2), (0.6, 0.6))))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("entropy", (1.0, 0.05), "95% of the policy's entropy is gone"),
        ("completions/distinct", (1.0, 0.2), "20% of a prompt's completions are distinct"),
        ("completions/clipped_ratio", (0.0, 0.5), "50% of completions meet the length limit"),
        ("frac_reward_zero_std", (0.1, 0.9), "90% of groups earn all the same"),
        ("expert_dead_share", (0.0, 0.25), "25% of experts are chosen by no token"),
    ],
)
def test_signs_of_collapse(name, values, words):
    rows = [{"step": step, name: value} for step, value in enumerate(values)]
    assert [words in sign for sign in signs_of_collapse(rows)] == [True]
    assert signs_of_collapse(rows[:1] * 3) == []


def test_figures_name_their_axes_and_leave_out_what_is_not_there():
    history = [{"step": s, "entropy": 1.0 - s / 10, "kl": None} for s in range(5)]
    figure = draw_panels(panels(history)["Signs of collapse"], history)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Policy entropy"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("step", "nats/token")
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert draw_panels(panels(history)["Experts"], history) is None
