"""What `moekit compress --heal` was asked and has done."""

from dataclasses import dataclass
from typing import Any

from ..compress.plan import LowRankRule
from .options import CompressOptions


@dataclass(frozen=True, kw_only=True)
class Healing:
    """What was done."""

    mode: str
    steps: int
    trained_parameters: int
    history: list[dict[str, Any]]
    """What the trainer logged."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"mode": self.mode, "steps": self.steps, "trained_parameters": self.trained_parameters}


def check_row_pruning(options: CompressOptions, rule: LowRankRule | None, *, is_sequential: bool) -> None:
    """Refuse a pruning of rows that cannot be, before any work.

    Raises:
        ValueError: Says what and what instead.
    """
    if not options.prune_rows:
        return
    if rule is None or rule.sparse_rows >= 1:
        got = "no rank" if rule is None else f"--sparse-rows {rule.sparse_rows:g}"
        raise ValueError(
            f"--prune-rows has nothing to prune: got {got}; add --rank and --sparse-rows below 1"
        )
    if options.heal != "kd":
        raise ValueError(
            f"--prune-rows goes with --heal kd, which trains the rows; got --heal {options.heal}"
        )
    if is_sequential or options.stream or options.until_collapse_risk is not None:
        raise ValueError(
            "--prune-rows needs a plan of all layers at once; leave out --stream and --until-collapse-risk, "
            "and say --sequential off"
        )


def check_healing(options: CompressOptions, *, is_encoder_decoder: bool) -> None:
    """Refuse a healing that cannot be, before any work.

    Raises:
        ValueError: Says what and what instead.
    """
    if options.heal == "none":
        said = [n for n in ("heal_steps", "heal_learning_rate") if getattr(options, n) is not None]
        if said:
            raise ValueError(f"--{said[0].replace('_', '-')} is of healing; add --heal router or --heal kd")
        return
    if options.plan_only:
        raise ValueError("--heal trains the result, and --plan-only makes none; give either")
    if options.heal_steps is not None and options.heal_steps < 1:
        raise ValueError(f"--heal-steps {options.heal_steps} must be at least 1")
    rate = options.heal_learning_rate
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"--heal-learning-rate {rate} must be above 0")
    if is_encoder_decoder:
        raise ValueError("--heal is for language models that read from left to right, not encoder-decoders")
