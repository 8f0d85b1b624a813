"""Optimizer steps on the completions of a rollout step."""

# B completions, L positions

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from .algorithm import Algorithm, MethodContext
from .batch import PolicyBatch
from .finite import check_gradient
from .mini_batches import Rows
from .objective import Objective
from .optimizer import set_rate
from .passes import PolicyPasses
from .selection import Selector
from .settings import PolicySettings
from .sums import Sums


@dataclass(kw_only=True)
class PolicyUpdater:
    """Takes the optimizer steps of an algorithm.

    Attributes:
        accelerator: Divides the work.
        passes: Of the policy.
        optimizer: Of the policy.
        algorithm: What is minimised.
        settings: How.
        rate: The learning rate at each optimizer step.
    """

    accelerator: Accelerator
    passes: PolicyPasses
    optimizer: Optimizer
    algorithm: Algorithm
    settings: PolicySettings
    rate: Callable[[int], float]

    @cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(accelerator=self.accelerator, algorithm=self.algorithm, settings=self.settings)

    @cached_property
    def selector(self) -> Selector:
        """For methods with a selection."""
        return Selector(accelerator=self.accelerator, algorithm=self.algorithm, settings=self.settings)

    def update(
        self, batch: PolicyBatch, parts: list[list[Rows]], context: MethodContext, sums: Sums, number: int
    ) -> int:
        """All optimizer steps on a batch that has its advantages.

        Args:
            batch: Of this process.
            parts: Its mini-batches.
            context: For the method.
            sums: Metrics are added to it.
            number: Optimizer steps done before.

        Returns:
            Optimizer steps taken.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; the step along it is not taken.
        """
        taken = 0
        self.optimizer.zero_grad()  # of a step that an error has ended
        for _ in range(self.settings.num_iterations):
            for mini in parts:
                micros = [batch.select(rows).to(self.accelerator.device) for rows in mini]
                keys = [rows[0] for rows in mini]
                if self.algorithm.selection is not None:
                    logprobs = self._logprobs(micros, keys, has_changed=taken > 0)
                    micros = self.selector.select(micros, logprobs, number + taken)
                set_rate(self.optimizer, self.rate(number + taken))
                self._step(micros, keys, context, sums)
                taken += 1
        return taken

    def _logprobs(
        self, micros: Sequence[PolicyBatch], keys: Sequence[int], *, has_changed: bool
    ) -> list[Tensor]:
        """Of the policy as it is: the old ones, until it has changed."""
        if not has_changed:
            return [micro.required("old_logprobs") for micro in micros]
        return [self.passes.logprobs(micro, key) for micro, key in zip(micros, keys, strict=True)]

    def _step(
        self, micros: Sequence[PolicyBatch], keys: Sequence[int], context: MethodContext, sums: Sums
    ) -> None:
        counts = self.objective.counts(micros)
        # Processes are averaged, and accelerate divides by its accumulation steps.
        scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        for number, (micro, key) in enumerate(zip(micros, keys, strict=True), 1):
            with self._accumulating(is_last=number == len(micros)), self.passes.replaying(key):
                now = self.passes.now(micro)
                loss = self.objective.loss(now, micro, counts, context, sums)
                self.accelerator.backward(loss * scale)
        self._clip_and_step(sums)

    @contextmanager
    def _accumulating(self, *, is_last: bool) -> Iterator[None]:
        state = self.accelerator.gradient_state
        state._set_sync_gradients(is_last)
        try:
            with nullcontext() if is_last else self.accelerator.no_sync(self.passes.policy):
                yield
        finally:
            state._set_sync_gradients(True)

    def _clip_and_step(self, sums: Sums) -> None:
        limit = self.settings.max_grad_norm or float("inf")
        norm: Any = self.accelerator.clip_grad_norm_(self.passes.policy.parameters(), limit)
        if norm is not None:
            value = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(float(norm))
            check_gradient(value)
            sums.add("grad_norm", value, 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
