"""An RL method as one row of data: pure functions, and how a trainer has to call them."""

# B completions, L positions, N valid tokens of a mini-batch on all processes

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from jaxtyping import Float
from torch import Tensor

from .rollout import Request

Reduction = Literal["token-mean", "sequence-mean", "fixed-length", "token-sum"]
"""How token losses become one number, over a mini-batch of all processes (see `reduction.py`)."""
Need = Literal[
    "old-pass", "entropy-gradient", "mean-vocab-logprobs", "demonstrations", "rehearsal", "reference"
]
"""What a trainer has to provide: statistics before the update even if there is one update only, entropies
that carry gradient, the vocabulary mean, demonstrations in the data, stored completions of the initial
policy, its log-probs."""


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What the policy in training says of the completions' tokens, at the sampling temperature.

    Attributes:
        logprobs: Of the tokens.
        entropies: Of the distributions they were drawn from, nats; with gradient only for methods that need
            ``entropy-gradient``.
        mean_vocab_logprobs: Mean over the vocabulary of log p, for methods that need it.
        router_loss: Load-balancing loss of the experts, where it is trained on.
    """

    logprobs: Float[Tensor, "B L"]
    entropies: Float[Tensor, "B L"]
    mean_vocab_logprobs: Float[Tensor, "B L"] | None = None
    router_loss: Float[Tensor, ""] | None = None


@dataclass(kw_only=True)
class MethodContext:
    """Where the training stands, and what a method remembers from step to step.

    Attributes:
        step: Rollout steps done.
        total_steps: Of the whole run.
        max_completion_length: L_max.
        mean_entropy: Mean over the valid tokens of this step on all processes, nats; only if there was a pass
            before the updates.
        state: The method's own numbers; JSON values, saved in every checkpoint.
    """

    step: int
    total_steps: int
    max_completion_length: int
    mean_entropy: float | None = None
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """A loss for each token, before reduction.

    Attributes:
        values: Only some count: of a policy loss those of the batch's `policy_mask`, of a regularizer the
            same or, with ``rehearsal``, those of its `rehearsal_mask`. The others are finite, whatever they
            are.
        metrics: ``[B, L]`` values without gradient, of which the mean over those that count is shown.
    """

    values: Float[Tensor, "B L"]
    metrics: Mapping[str, Float[Tensor, "B L"]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SelectionInputs:
    """All valid tokens of an optimizer mini-batch, of all processes, in one row and without gradient."""

    logprobs: Float[Tensor, " N"]
    old_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    generator: torch.Generator


RolloutShaper = Callable[..., Sequence[Request]]
"""``(prompt, num_generations, tokenizer, max_completion_length, *, settings)``: what is asked of the policy
for one prompt; the samples of all requests form its group."""
Advantage = Callable[..., Tensor]
"""``(batch, context, *, settings)``: ``[B]``, or ``[B, L]`` with token weights folded in; of whole groups,
without gradient. NaN rewards get 0."""
PolicyLoss = Callable[..., TokenLoss]
"""``(now, batch, context, *, settings)``: a loss for each token of a micro-batch; ``batch.advantages`` and
``batch.old_logprobs`` are set."""
Selection = Callable[..., Tensor]
"""``(tokens, *, settings)``: ``[N]`` bool, which tokens of a mini-batch the loss treats otherwise."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One method.

    Attributes:
        title: As in tables.
        paper: arXiv id, or who proposed it.
        advantage: See `Advantage`.
        policy_loss: See `PolicyLoss`.
        reduction: Of the policy loss.
        regularizer: A second loss that is added, reduced on its own (EPO, DPH-RL).
        regularizer_reduction: How.
        shaper: See `RolloutShaper`; by default G plain samples.
        selection: Over the whole mini-batch (Clip-Cov, KL-Cov); gives ``batch.selected``.
        observe: ``(context, *, settings)``, called in every step before the advantages.
        needs: What the trainer has to provide beyond the common.
        min_updates: Fewest optimizer steps a rollout for the method to do anything of its own.
        max_updates: Most for which its mathematics holds.
        min_group: Fewest completions of a prompt.
        drops_uninformative: Sample on until the groups' rewards differ (DAPO's dynamic sampling).
        trainer_defaults: Trainer settings that the paper uses, by option name.
        settings: The method's hyper-parameters that differ from its functions' defaults.
    """

    title: str
    paper: str
    advantage: Advantage
    policy_loss: PolicyLoss
    reduction: Reduction = "token-mean"
    regularizer: PolicyLoss | None = None
    regularizer_reduction: Reduction = "token-mean"
    shaper: RolloutShaper | None = None
    selection: Selection | None = None
    observe: Callable[..., None] | None = None
    needs: frozenset[Need] = frozenset()
    min_updates: int = 1
    max_updates: int | None = None
    min_group: int = 2
    drops_uninformative: bool = False
    trainer_defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def hyperparameters(self) -> dict[str, Any]:
        """Every setting of the method with its value."""
        return {name: p.default for name, p in self._parameters().items()} | dict(self.settings)

    def with_settings(self, **changes: Any) -> "Algorithm":
        """The same method with other hyper-parameters.

        Raises:
            ValueError: It has no such setting, or the value does not fit the setting's type.
        """
        known = self._parameters()
        for name in changes:
            if name not in known:
                allowed = ", ".join(sorted(known)) or "none"
                raise ValueError(f"{self.title} has no setting {name!r}; its settings: {allowed}")
        fitting = {name: _fitting(self.title, name, v, known[name].annotation) for name, v in changes.items()}
        return replace(self, settings={**self.settings, **fitting})

    def bound(self, name: str) -> Callable[..., Any] | None:
        """One of the functions with its settings filled in.

        Args:
            name: ``advantage``, ``policy_loss``, ``regularizer``, ``shaper``, ``selection`` or ``observe``.
        """
        function = self._functions().get(name)
        if function is None:
            return None
        values = self.hyperparameters()
        return partial(function, **{key: values[key] for key in _keywords(function)})

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return {n: p for f in self._functions().values() for n, p in _keywords(f).items()}

    def _functions(self) -> dict[str, Callable[..., Any]]:
        names = ("advantage", "policy_loss", "regularizer", "shaper", "selection", "observe")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _fitting(title: str, name: str, value: Any, hint: Any) -> Any:
    """The value as the annotation wants it: whole numbers become floats, lists become tuples."""
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_fitting(title, name, v, get_args(option)[0]) for v in value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if option is float and is_number and math.isfinite(value):
            return float(value)
        if option in (bool, int, str, NoneType) and type(value) is option:
            return value
    choices = " or ".join(map(repr, get_args(hint))) if get_origin(hint) is Literal else _named(hint)
    raise ValueError(f"{title}'s setting {name}={value!r} must be {choices}")


def _named(hint: Any) -> str:
    return "a finite number" if hint is float else getattr(hint, "__name__", str(hint))
