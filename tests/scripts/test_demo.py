import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from moekit.rl import PolicyTrainer
from moekit.scripts import cli, demo
from moekit.scripts.staging import partial_folder

from .tiny_rl_runs import fresh, record, skip_pictures
from .tiny_training import KilledError

TASK = "reasoning-gym:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1,size=30"
TINY_RL = {
    "data": TASK,
    "reward": ("exact-match", "soft-overlong"),
    "num_generations": 4,
    "prompts_per_step": 2,
    "max_completion_length": 6,
    "eval_prompts": 2,
    "eval_generations": 1,
    "save_steps": 1,
    "logging_steps": 1,
}
"""What a random model does in a second."""


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


@pytest.fixture
def bundled_rl(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training of it that takes as long."""
    if find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    monkeypatch.setattr(demo, "RL", demo.RL | TINY_RL)
    monkeypatch.setattr(demo, "RL_STEPS", 2)
    skip_pictures(monkeypatch)
    monkeypatch.setattr(demo.compress, "write_report", lambda folder, _: (folder / "report.html").touch())
    return bundled


@pytest.mark.slow
def test_an_earlier_training_is_replaced_with_what_it_began_from(bundled_rl, tmp_path, capsys):
    out = tmp_path / "results" / "demo"
    arguments = ["demo", "rl", "--out", str(out)]
    assert fresh(arguments) == 0
    names = ["demo", "demo-compressed"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    assert record(out)["config"]["model"] == str(out.with_name("demo-compressed"))
    assert record(out)["training"]["steps"] == 2
    assert "On 2 held-out prompts" in capsys.readouterr().out
    old = [out / "report.html", out.with_name("demo-compressed") / "report.html"]
    for page in old:
        page.write_text("old", encoding="utf-8")
    assert fresh(arguments) == 0
    assert all(page.read_text(encoding="utf-8") != "old" for page in old)
    assert sorted(path.name for path in out.parent.iterdir()) == names


@pytest.mark.parametrize("name", ["demo", "demo-compressed"])
def test_no_other_result_is_replaced_by_a_training(bundled_rl, tmp_path, capsys, name):
    """Which is seen before the minute's work."""
    other = tmp_path / "results" / name
    other.mkdir(parents=True)
    facts = {"format": "moekit.run", "config": {"model": "mine"}}
    (other / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    before = files(tmp_path / "results")
    assert fresh(["demo", "rl", "--out", str(tmp_path / "results" / "demo")]) == 2
    assert f"'{other}' exists and is not empty" in capsys.readouterr().err
    assert files(tmp_path / "results") == before


def test_a_killed_training_goes_on_from_the_same_compressed_model(bundled_rl, tmp_path, monkeypatch, capsys):
    arguments, step = ["demo", "rl", "--out", str(tmp_path / "demo")], PolicyTrainer._step

    def die(self: PolicyTrainer) -> object:
        if self.state.step == 1:
            raise KilledError
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_step", die)
        with pytest.raises(KilledError):
            fresh(arguments)
    assert partial_folder(tmp_path / "demo").is_dir()
    capsys.readouterr()
    before = files(tmp_path / "demo-compressed")
    assert fresh(arguments) == 0
    assert "Going on from step 1" in capsys.readouterr().err
    assert files(tmp_path / "demo-compressed") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundled", "demo", "demo-compressed"]


def test_a_training_needs_the_package_that_makes_its_task(bundled_rl, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    before = sorted(tmp_path.iterdir())
    assert fresh(["demo", "rl", "--out", str(tmp_path / "demo")]) == 2
    assert "needs the package reasoning-gym: pip install 'moekit[rl]'" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
