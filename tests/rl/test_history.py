"""The history on the disk: what a kill, a resume and damage do to it."""

import json
import math

import pytest
from moekit.rl.history import History


@pytest.fixture
def history(tmp_path):
    history = History(tmp_path / "run" / "history.jsonl")
    for step in range(4):
        history.append({"step": step, "reward": step / 2})
    return history


def test_rows_come_back(history):
    assert history.read() == [{"step": step, "reward": step / 2} for step in range(4)]
    assert History(history.path.with_name("none.jsonl")).read() == []


def test_numbers_that_are_not_finite_become_null(history):
    history.append({"step": 4, "kl": math.nan, "reward": math.inf, "entropy": 1.0})
    assert history.read()[-1] == {"step": 4, "kl": None, "reward": None, "entropy": 1.0}
    assert "NaN" not in history.path.read_text()


def test_text_may_hold_any_character(history):
    text = 'line\nend\u2028and\x85"quotes" ü'
    history.append({"step": 4, "completion": text})
    assert history.read()[-1]["completion"] == text


def test_resuming_drops_later_rows_and_a_cut_line(history):
    with history.path.open("a") as file:
        file.write('{"step": 4, "rew')
    assert [row["step"] for row in history.read()] == [0, 1, 2, 3]
    history.truncate(2)
    history.append({"step": 3, "reward": 9.0})
    assert [(row["step"], row["reward"]) for row in history.read()] == [(0, 0), (1, 0.5), (2, 1), (3, 9.0)]
    history.truncate(-1)
    assert history.read() == []
    assert [path.name for path in history.path.parent.iterdir()] == ["history.jsonl"]


def test_last_line_that_is_no_row_is_left_out(history):
    with history.path.open("ab") as file:
        file.write(b"\0\0\0\n")
    assert len(history.read()) == 4


@pytest.mark.parametrize("bad", ["{", "[1]", '{"reward": 1}', '{"step": "1"}', "[" * 100_000])
def test_damage_within_is_named_by_its_line(history, bad):
    lines = history.path.read_text().splitlines()
    history.path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of '.*history\.jsonl' is damaged"):
        history.read()


def test_a_failed_rewrite_leaves_the_file(history, monkeypatch):
    before = history.path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="no space"):
        history.truncate(1)
    assert history.path.read_bytes() == before
    assert json.loads(before.splitlines()[0]) == {"step": 0, "reward": 0.0}
