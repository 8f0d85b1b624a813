"""Checks of the options that every command that trains has; they need no model and no data."""

from collections.abc import Callable, Iterable

from .options import CommonOptions, TrainingOptions, flag
from .prepare import check_machine, check_names, check_shard_size
from .staging import check_output

POSITIVE = (
    "steps",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "save_steps",
    "eval_steps",
    "logging_steps",
)
NOT_NEGATIVE = ("learning_rate", "warmup", "weight_decay")


def check_training_options(options: TrainingOptions) -> None:
    """Refuse what the options alone show cannot be.

    Raises:
        ValueError: Names the option.
    """
    check_names(options.model, options.data)
    if options.data is None:
        raise ValueError(f"--data is missing: name what to train on (see `moekit {options.command} --help`)")
    if options.out is None:
        raise ValueError("--out is missing: name the folder to make")
    check_output(options.out.expanduser())
    if options.steps is not None and options.epochs is not None:
        raise ValueError(
            f"give --steps or --epochs, got --steps {options.steps} and --epochs {options.epochs}"
        )
    check_positive(options, POSITIVE)
    check_not_negative(options, NOT_NEGATIVE)
    if not 0 < options.eval_share < 1:
        raise ValueError(f"--eval-share {options.eval_share} is not between 0 and 1")
    check_shard_size(options.max_shard_size)
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed} is not between 0 and {2**32 - 1}, which numpy asks for")
    check_machine(None, options.seed)


def check_positive(options: CommonOptions, names: Iterable[str]) -> None:
    """Refuse options that were given and are not finite numbers above 0.

    Raises:
        ValueError: Names the first.
    """
    _check_each(options, names, lambda value: 0 < value < float("inf"), "a positive number")


def check_not_negative(options: CommonOptions, names: Iterable[str]) -> None:
    """Refuse options that were given and are not finite numbers of at least 0.

    Raises:
        ValueError: Names the first.
    """
    _check_each(options, names, lambda value: 0 <= value < float("inf"), "a finite number of at least 0")


def _check_each(
    options: CommonOptions, names: Iterable[str], is_right: Callable[[float], bool], wanted: str
) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not is_right(value):
            raise ValueError(f"{flag(name)} {value} is not {wanted}")
