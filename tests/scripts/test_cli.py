import errno
import shlex
import subprocess
import sys
import typing
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from moekit.compress.m_smoe import GROUPINGS
from moekit.compress.merging import REFERENCES, WEIGHTINGS
from moekit.compress.methods import METHODS
from moekit.compress.plan import ALIGNMENTS, FORMS, ROUTERS
from moekit.compress.similarity import SIMILARITIES
from moekit.scripts import cli, compress, inspect_model
from moekit.scripts.options import CompressOptions, InspectOptions, command_line

from .tiny_checkpoints import TEXT_OPTIONS


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


def _literals(hint: Any) -> list[str]:
    """Of a Literal, or of a union of them."""
    return [word for part in typing.get_args(hint) for word in (typing.get_args(part) or [part])]


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
    choices = set(_literals(typing.get_type_hints(CompressOptions)[option])) - {"auto"}
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
    assert capsys.readouterr().err == "moekit: interrupted\n"


def test_only_what_can_go_on_says_so(monkeypatch, capsys):
    def run(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "run", run)
    assert cli.main(["compress", "m"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert cli.main(["compress", "m", "--plan-only"]) == 130
    assert capsys.readouterr().err == "moekit: interrupted\n"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moekit {version('moekit')}\n"


@pytest.mark.parametrize(
    ("command", "flag", "words"),
    [
        ("compress", "--no-report", "do not compare the result"),
        ("inspect", "--no-load-weights", "do not read the weights"),
    ],
)
def test_help_of_a_negative_flag_says_what_the_flag_does(capsys, command, flag, words):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{flag}: {words}" in shown


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", 9, "--out", "OUT"), "experts=9 is not between 1 and 8 experts"),
        (("--experts", 0, "--out", "OUT"), "experts=0 is not between 1 and 8 experts"),
        (("--experts", 1, "--out", "OUT"), "fewer than its router selects, top_k=2"),
        (("--ratio", 1.5, "--out", "OUT"), "ratio=1.5 is not a share in (0, 1]"),
        (("--ratio", 0.5), "--out is missing"),
        (
            ("--out", "OUT"),
            "--until-collapse-risk and --plan, got none of them",
        ),
        (("--experts", 4, "--ratio", 0.5, "--out", "OUT"), "got --experts and --ratio"),
        (("--plan", "none.json", "--out", "OUT"), "there is no plan at 'none.json'"),
        (("--plan", "p", "--plan-only", "--out", "OUT"), "--plan carries out a plan"),
        (
            ("--plan", "p", "--method", "frequency", "--exclude-layers", 1, "--out", "OUT"),
            "--plan has settled --method, --exclude-layers;",
        ),
        (("--plan", "p", "--form", "stock", "--router", "mean", "--out", "OUT"), "--form, --router;"),
        (("--experts", 4, "--max-shard-size", "big", "--out", "OUT"), "--max-shard-size 'big' is not a size"),
        (("--experts", 4, "--max-shard-size", "0GB", "--out", "OUT"), "--max-shard-size '0GB'"),
        (("--experts", 4, "--device", "toaster", "--out", "OUT"), "--device toaster cannot be used"),
        (("--experts", 4, "--device", "cuda:99", "--out", "OUT"), "--device cuda:99 cannot be used"),
        (
            ("--experts", 4, "--seed", -1, "--out", "OUT"),
            "--seed -1 is not between 0 and 9223372036854775807",
        ),
        (("--experts", 4, "--seed", 2**64, "--out", "OUT"), "is not between 0 and"),
        (("--experts", 4, "--data", "", "--out", "OUT"), "--data is empty"),
        (
            ("--experts", 4, "--form", "stock", "--exclude-layers", 1, "--out", "OUT"),
            "so --exclude-layers cannot be",
        ),
        (("--experts", 4, "--exclude-layers", 7, "--out", "OUT"), "the MoE layers are 0 to 1"),
        (("--experts", 4, "--batch-size", 0, "--out", "OUT"), "--batch-size 0"),
        (("--experts", 4, "--answer-marker", " ", "--out", "OUT"), "is blank"),
        (("--experts", 4, "--seq-len", 500, "--out", "OUT"), "more than the model's context of 128"),
        (("--experts", 4, "--eval-tokens", 3, "--out", "OUT"), "--eval-tokens 3 is less than one sequence"),
        (("--experts", 4, "--form", "stock", "--router", "redirect", "--out", "OUT"), "router='redirect'"),
        (("--experts", 4, "--form", "stock", "--grouping", "adaptive", "--out", "OUT"), "form='stock' needs"),
        (
            ("--experts", 4, "--method", "frequency", "--similarity", "outputs", "--out", "OUT"),
            "--similarity does not apply to --method frequency",
        ),
    ],
)
def test_options_that_cannot_be(checkpoint, data, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    given = [str(out if option == "OUT" else option) for option in options]
    assert cli.main(["compress", str(checkpoint), "--data", str(data), *TEXT_OPTIONS, *given]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("code", [0, cli.USER_ERROR])
def test_one_of_several_processes_ends_at_once(code):
    """With its trackers finished, and whatever threads it has, which the interpreter would wait for."""
    program = (
        "import atexit, threading, time\n"
        "from torch import distributed\n"
        "from moekit.scripts import cli\n"
        "distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)\n"
        "atexit.register(lambda: print('finished, together:', distributed.is_initialized()))\n"
        "threading.Thread(target=time.sleep, args=(300,)).start()\n"
        f"cli.main = lambda argv: {code}\n"
        "cli.command([])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout == f"finished, together: {code != 0}\n"


def test_a_single_process_ends_with_the_code_of_its_command(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: 7)
    with pytest.raises(SystemExit, match="7"):
        cli.command([])
