"""What a student is trained to do: which losses, of which head, with what weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor

from .fused import OBJECTIVES, Objective, by_rows
from .losses import LOSSES, LossMethod, cached_top_k_kl, published_weight

HEADS = ("single", "dual")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationRecipe:
    """``g CE + a L`` of one head, or CE of the task head and L of the auxiliary one.

    Raises:
        ValueError: A name that does not exist, a number out of its range, or an option that L does not take.
    """

    loss: str = "kl"
    """L, a key of `LOSSES`."""
    heads: str = "single"
    """``single``, or ``dual`` (DHKD): the task head hears the labels alone, the auxiliary one L alone."""
    weight: float | None = None
    """a, of L. 1 unless said otherwise, but `published_weight` for ``binary-kl-norm``."""
    label_weight: float = 1.0
    """g, of the labels' cross-entropy. 0 for pure distillation, which needs no labels but theirs of which
    tokens count."""
    temperature: float | None = None
    """tau; by default the loss's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of L, such as ``center``, ``beta``, ``skew`` or ``k``."""
    load_balance: float = 0.0
    """Weight of the load-balancing loss of a student with experts."""

    def __post_init__(self) -> None:
        """Check everything."""
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not one of {', '.join(LOSSES)}")
        if self.heads not in HEADS:
            raise ValueError(f"heads={self.heads!r} is not one of {', '.join(HEADS)}")
        for name in ("weight", "label_weight", "load_balance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} is not a finite number of at least 0")
        if self.weight == 0 and self.label_weight == 0:
            raise ValueError("weight=0 and label_weight=0 leave nothing to learn")
        if self.heads == "dual" and self.label_weight == 0:
            raise ValueError("heads='dual' with label_weight=0 would leave the task head untrained")
        taken = set(signature(self.method.function).parameters) - NOT_OPTIONS
        if unknown := sorted(set(self.options) - taken):
            allowed = f"takes {', '.join(sorted(taken))}, not" if taken else "takes no options; leave out"
            raise ValueError(f"the loss {self.loss!r} {allowed} {unknown[0]!r}")

    @property
    def method(self) -> LossMethod:
        """L, and what it needs."""
        return LOSSES[self.loss]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of L."""
        tempered = {} if self.temperature is None else {"temperature": self.temperature}
        return {**tempered, **self.options}

    def rows_loss(self) -> Callable[..., Tensor]:
        """L of logits: one value for each row."""
        return partial(self.method.function, **self.arguments)

    def likeliest_loss(self) -> Callable[..., Tensor]:
        """L of logits and a teacher's likeliest tokens, for ``top-k-kl``: one value for each row."""
        arguments = {name: value for name, value in self.arguments.items() if name != "k"}
        return partial(cached_top_k_kl, **arguments)

    def objective(self, *, by_likeliest: bool = False) -> Objective:
        """L of hidden states and heads.

        Args:
            by_likeliest: Whether the teacher is known by its likeliest tokens alone.
        """
        if by_likeliest:
            return by_rows(self.likeliest_loss(), compares_columns=False, needs_ids=True)
        if (build := OBJECTIVES.get(self.loss)) is not None:
            return build(**self.arguments)
        method = self.method
        return by_rows(
            self.rows_loss(),
            needs_labels=method.needs_labels,
            compares_columns=method.needs_same_vocabulary,
        )

    def weight_for(self, num_classes: int) -> float:
        """a, for a teacher of so many classes."""
        if self.weight is not None:
            return self.weight
        if self.loss != "binary-kl-norm":
            return 1.0
        return published_weight(num_classes, self.options.get("reduction", "sum"))


NOT_OPTIONS = {"student_logits", "teacher_logits", "temperature", "labels_N"}
"""Arguments of a loss that are not the recipe's to give."""
