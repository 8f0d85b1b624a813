"""The `moekit` command: read the options, run the job, turn the user's errors into one line."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import tyro

from .console import quiet_deepspeed
from .distill_options import DistillOptions
from .options import (
    CommonOptions,
    CompressOptions,
    DemoOptions,
    InspectOptions,
    TrainingOptions,
    TrainOptions,
)
from .process_end import leave_together, works_together
from .rl_options import RlOptions

USER_ERROR = 2
INTERRUPTED = 130

JOBS: dict[type[CommonOptions], str] = {
    InspectOptions: "inspect_model",
    CompressOptions: "compress",
    TrainOptions: "train",
    DistillOptions: "distill",
    RlOptions: "rl",
    DemoOptions: "demo",
}
"""The module of each command; its `run` is imported after parsing, so that `--help` needs no torch."""

RESUMING = CompressOptions | TrainingOptions | RlOptions | DemoOptions

Command = (
    Annotated[InspectOptions, tyro.conf.subcommand("inspect")]
    | Annotated[CompressOptions, tyro.conf.subcommand("compress")]
    | Annotated[TrainOptions, tyro.conf.subcommand("train")]
    | Annotated[DistillOptions, tyro.conf.subcommand("distill")]
    | Annotated[RlOptions, tyro.conf.subcommand("rl")]
    | Annotated[DemoOptions, tyro.conf.subcommand("demo")]
)


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line as a process of its own, perhaps one of several, and end it.

    Args:
        argv: As for `main`.

    Raises:
        SystemExit: Always, where there are no other processes.
    """
    code = main(argv)
    if works_together():
        leave_together(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line in this process, which goes on.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0, or 2 after an error that the user can mend, or 130 after Ctrl-C.

    Raises:
        SystemExit: For `--help` (0) and arguments that cannot be parsed (2).
    """
    quiet_deepspeed()
    options = None
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments == ["--version"]:
            print(f"moekit {version('moekit')}")
            return 0
        options = parse(arguments)
        _job(options)(options)
    except BrokenPipeError:
        # Whoever read the output has gone (`moekit ... | head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        resumes = isinstance(options, RESUMING) and not getattr(options, "plan_only", False)
        after = "; the output was not touched, and the same command goes on where it was" if resumes else ""
        _say(f"interrupted{after}")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if (options and options.debug) or os.environ.get("MOEKIT_DEBUG"):
            raise
        _say(f"error: {one_line(error)}")
        return USER_ERROR
    return 0


def parse(argv: Sequence[str]) -> CommonOptions:
    """Options of a command line; a bare `moekit` shows the help."""
    return tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="moekit",
        description="Look at sparse Mixture-of-Experts language models, make them smaller, make them of "
        "dense ones, teach others what they know, or improve them by reinforcement learning. "
        "`moekit --version` tells the version.",
        args=list(argv) or ["--help"],
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def one_line(error: BaseException) -> str:
    """The message of an error on a single line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        place = f": '{error.filename}'" if error.filename else ""
        text = f"{error.strerror}{place}"
        if error.errno == errno.ENOSPC:
            text += "; free some space and give the same command again"
    return " ".join(text.split()) or type(error).__name__


def _job(options: CommonOptions) -> Callable[[Any], object]:
    return import_module(f".{JOBS[type(options)]}", __package__).run


def _say(text: str) -> None:
    print(f"moekit: {text}", file=sys.stderr)


if __name__ == "__main__":
    command()
