import errno
import shlex
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest
from moekit.compress.m_smoe import GROUPINGS
from moekit.compress.merging import REFERENCES, WEIGHTINGS
from moekit.compress.methods import METHODS
from moekit.compress.plan import ALIGNMENTS, FORMS, ROUTERS
from moekit.compress.similarity import SIMILARITIES
from moekit.scripts import cli, demo, inspect_model
from moekit.scripts.options import CompressOptions, InspectOptions, command_line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compress", "--help"], ["inspect", "--help"]])
def test_help_imports_neither_torch_nor_transformers(arguments):
    code = (
        "import sys\n"
        "from moekit.scripts.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "finally:\n"
        "    print('loaded:', {'torch', 'transformers', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: moekit" in done.stdout
    assert "loaded: set()" in done.stdout


def test_every_command_has_a_job():
    for options, module in cli.JOBS.items():
        assert callable(import_module(f"moekit.scripts.{module}").run), options


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("method", tuple(METHODS)),
        ("form", FORMS),
        ("router", ROUTERS),
        ("grouping", GROUPINGS),
        ("similarity", tuple(SIMILARITIES)),
        ("weighting", WEIGHTINGS),
        ("alignment", ALIGNMENTS),
        ("reference", REFERENCES),
    ],
)
def test_choices_are_those_of_the_library(option, allowed):
    choices = set(typing.get_args(typing.get_type_hints(CompressOptions)[option])) - {"auto"}
    assert choices == set(allowed)


@pytest.mark.parametrize(
    "options",
    [
        CompressOptions(model="a/b", out=Path("some where"), experts=8, form="stock", report=False),
        CompressOptions(model="./m", plan=Path("p.json"), exclude_layers=(0, 3), answer_marker=r"\nType:"),
        CompressOptions(model="m", ratio=0.25, plan_only=True, device="cpu"),
    ],
)
def test_recorded_command_gives_the_same_options(options):
    assert cli.parse(shlex.split(command_line("compress", options))[1:]) == options


def failing(monkeypatch, error: BaseException) -> None:
    def run(_):
        raise error

    monkeypatch.setattr(inspect_model, "run", run)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("keep=12 is wrong;\n  use less"), "moekit: error: keep=12 is wrong; use less\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "moekit: error: No such file: 'x'\n"),
        (OSError(errno.ENOSPC, "No space left"), "moekit: error: No space left; free some space"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(monkeypatch, capsys, error, line):
    failing(monkeypatch, error)
    assert cli.main(["inspect", "m"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_debug_shows_the_traceback(monkeypatch):
    failing(monkeypatch, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["inspect", "m", "--debug"])
    monkeypatch.setenv("MOEKIT_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["inspect", "m"])


def test_faults_of_moekit_itself_are_not_hidden(monkeypatch):
    failing(monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["inspect", "m"])


def test_interruption_is_one_line_and_exit_code_130(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.main(["inspect", "m"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_arguments_that_cannot_be_parsed_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compress", "m", "--experts", "many"])
    assert stopped.value.code == 2
    assert "--experts" in capsys.readouterr().err


def test_job_gets_the_parsed_options(monkeypatch):
    seen = []
    monkeypatch.setattr(inspect_model, "run", seen.append)
    assert cli.main(["inspect", "m", "--tokens", "5", "--no-load-weights"]) == 0
    assert seen == [InspectOptions(model="m", tokens=5, load_weights=False)]


def test_demo_replaces_only_what_moekit_made(monkeypatch, tmp_path, capsys):
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(demo, "bundled_folder", lambda: bundled)
    asked = []
    monkeypatch.setattr(demo.compress, "run", asked.append)
    assert cli.main(["demo"]) == 2
    assert "came without the demo's model" in capsys.readouterr().err
    (bundled / "config.json").write_text("{}", encoding="utf-8")
    out = tmp_path / "demo"
    out.mkdir()
    (out / "run.json").write_text('{"format": "moekit.run"}', encoding="utf-8")
    assert cli.main(["demo", "--out", str(out)]) == 0
    assert not out.exists()
    assert asked[0].ratio == 0.5
    assert asked[0].model == str(bundled)
    out.mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    assert cli.main(["demo", "--out", str(out)]) == 0
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "mine"
