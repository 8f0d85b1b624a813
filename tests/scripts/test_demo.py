import json
import shutil
from pathlib import Path

import pytest
from moekit.scripts import cli, demo


@pytest.fixture
def bundled(checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model of a few kilobytes."""
    folder = shutil.copytree(checkpoint, tmp_path / "bundled")
    shutil.copyfile(data, folder / demo.SAMPLE_FILE)
    monkeypatch.setattr(demo, "bundled_folder", lambda: folder)
    for name, value in (("SEQ_LEN", 32), ("CALIBRATION_TOKENS", 1024), ("EVAL_TOKENS", 256)):
        monkeypatch.setattr(demo, name, value)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_demo_is_replaced_once_the_new_one_is_whole(bundled, tmp_path, capsys):
    out = tmp_path / "results" / "demo"
    arguments = ["demo", "--out", str(out)]
    assert cli.main(arguments) == 0
    (out / "report.html").write_text("old", encoding="utf-8")
    before = files(out)
    sample = bundled / demo.SAMPLE_FILE
    text = sample.read_text(encoding="utf-8")
    sample.write_text("", encoding="utf-8")
    assert cli.main(arguments) == 2
    assert "holds no text" in capsys.readouterr().err
    assert files(out) == before
    sample.write_text(text, encoding="utf-8")
    assert cli.main(arguments) == 0
    assert (out / "report.html").read_bytes() != b"old"
    assert [path.name for path in out.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("change", [{"model": "mine"}, {"ratio": 0.25}, {"form": "stock"}])
def test_another_result_is_not_replaced(bundled, tmp_path, capsys, change):
    out = tmp_path / "demo"
    out.mkdir()
    config = {"model": str(bundled), "ratio": 0.5, "form": "moekit"}
    facts = {"format": "moekit.run", "config": {**config, **change}}
    (out / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    before = files(out)
    assert cli.main(["demo", "--out", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.parametrize("option", [("model", "mine"), ("ratio", 0.25), ("seed", 1), ("form", "stock")])
def test_a_demo_is_told_by_all_its_settings(bundled, tmp_path, monkeypatch, option):
    asked = []
    monkeypatch.setattr(demo.compress, "run", lambda job, *, replace: asked.append((job, replace)))
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out)]) == 0
    job = asked[0][0]
    config = {name: value for name, value in vars(job).items() if name != "out"}
    out.mkdir()
    for changes, expected in (({}, True), (dict([option]), False)):
        facts = {"format": "moekit.run", "config": {**config, **changes}}
        (out / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        assert demo.is_earlier_demo(out, job) is expected
        assert cli.main(["demo", "--out", str(out)]) == 0
        assert asked[-1][1] is expected


def test_an_installation_without_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "bundled_folder", lambda: tmp_path)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "came without the demo's model" in capsys.readouterr().err
