"""Forward passes of the policy in training: before the updates and in them, with what watches its routers."""

# B completions, L positions

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..moe.router_replay import RoutedExperts, record_choices, replay_choices
from .algorithm import Algorithm, TokenStatistics
from .batch import PolicyBatch
from .expert_metrics import ExpertMeter
from .mini_batches import Rows
from .policy import Policy, policy_inputs, statistics_of
from .reference import Reference
from .settings import PolicySettings


@dataclass(kw_only=True)
class PolicyPasses:
    """Asks the policy for what a method needs.

    Attributes:
        accelerator: Of whose device the policy is.
        policy: As `Accelerator.prepare` returned it.
        plain: The policy without what wraps it.
        algorithm: Says what is needed.
        settings: Of temperature and router replay.
        reference: The policy before the training, where it is needed.
        routes: Experts that were chosen before the updates, by the first row of a micro-batch.
    """

    accelerator: Accelerator
    policy: nn.Module
    plain: Policy
    algorithm: Algorithm
    settings: PolicySettings
    reference: Reference | None
    routes: dict[int, RoutedExperts] = field(default_factory=dict, init=False)
    _meter: ExpertMeter | None = field(default=None, init=False)

    @property
    def needs_old(self) -> bool:
        """Whether log-probs before the updates differ from those in the update, or are wanted before it."""
        return (
            self.settings.updates_per_rollout > 1
            or self.settings.router_replay
            or self.algorithm.selection is not None
            or bool(self.algorithm.needs & {"old-pass", "mean-vocab-logprobs"})
        )

    @torch.no_grad()
    def with_old(self, batch: PolicyBatch, parts: list[list[Rows]]) -> PolicyBatch:
        """The batch with log-probs, entropies and what else is wanted of the policy before the updates.

        Args:
            batch: On the CPU, where it stays.
            parts: The same micro-batches as in the updates, so that ratios begin at exactly 1.
        """
        names = {"old_logprobs": "logprobs", "old_entropies": "entropies"}
        if "mean-vocab-logprobs" in self.algorithm.needs:
            names["old_mean_vocab_logprobs"] = "mean_vocab_logprobs"
        found = {name: torch.zeros(batch.completion_ids.shape) for name in names}
        self.routes.clear()
        for rows in (rows for mini in parts for rows in mini):
            micro = batch.select(rows).to(self.accelerator.device)
            with self._recording(rows[0]), self._listening(micro):
                now = self._statistics(micro)
            for name, source in names.items():
                value: Tensor = getattr(now, source)
                found[name][rows, : value.shape[1]] = value.float().cpu()
        return batch.with_(**found)

    def with_reference(self, batch: PolicyBatch, parts: list[list[Rows]]) -> PolicyBatch:
        """The batch with the reference's log-probs, if there is a reference.

        Args:
            batch: On the CPU, where it stays; rehearsal samples keep those that they have.
            parts: See `with_old`.
        """
        if self.reference is None:
            return batch
        found = torch.zeros(batch.completion_ids.shape)
        for rows in (rows for mini in parts for rows in mini):
            micro = batch.select(rows).to(self.accelerator.device)
            logprobs = self.reference.logprobs(micro, temperature=self.settings.temperature)
            found[rows, : logprobs.shape[1]] = logprobs.float().cpu()
        if batch.ref_logprobs is not None:
            found = torch.where(batch.is_rehearsal[:, None], batch.ref_logprobs, found)
        return batch.with_(ref_logprobs=found)

    @torch.no_grad()
    def own_logprobs(self, batch: PolicyBatch) -> Tensor:
        """``[B, L]`` by the unwrapped policy, whose weights must be whole, whatever other processes do."""
        found = torch.zeros(batch.completion_ids.shape)
        for rows in torch.arange(len(batch)).split(self.settings.micro_batch_size):
            micro = batch.select(rows).to(self.accelerator.device)
            now = statistics_of(self.plain, micro, temperature=self.settings.temperature)
            found[rows, : now.logprobs.shape[1]] = now.logprobs.float().cpu()
        return found

    def now(self, micro: PolicyBatch) -> TokenStatistics:
        """Statistics with gradient, in an update; `replaying` belongs around it and its backward pass."""
        # Without a pass before the updates, this is the only one of a step.
        with nullcontext() if self.needs_old else self._listening(micro):
            needs = self.algorithm.needs
            with_gradient = "entropy-gradient" in needs or self.settings.entropy_coef > 0
            return self._statistics(micro, with_entropy_gradient=with_gradient)

    @torch.no_grad()
    def logprobs(self, micro: PolicyBatch, key: int) -> Tensor:
        """``[B, L]`` without gradient, between updates.

        Args:
            micro: On the device.
            key: First row of the micro-batch.
        """
        with self.replaying(key):
            return self._statistics(micro).logprobs

    @contextmanager
    def replaying(self, key: int) -> Iterator[None]:
        """Choose the experts of the pass before the updates again, if that is wanted.

        Args:
            key: First row of the micro-batch.
        """
        if not self.settings.router_replay:
            yield
            return
        with replay_choices(self.plain.plain, self.routes[key], self.plain.layers):
            yield

    def take_expert_metrics(self) -> dict[str, float]:
        """Of the passes since the last call, on all processes; every process calls it."""
        if not self.plain.layers:
            return {}
        meter, self._meter = self._meter_in_use, None
        total: Any = self.accelerator.reduce(meter.sums.to(self.accelerator.device), reduction="sum")
        meter.sums = total
        return meter.metrics()

    @property
    def _meter_in_use(self) -> ExpertMeter:
        if self._meter is None:
            self._meter = ExpertMeter(self.plain.layers)
        return self._meter

    @contextmanager
    def _listening(self, micro: PolicyBatch) -> Iterator[None]:
        if not self.plain.layers:
            yield
            return
        with self._meter_in_use.listen(self.plain.arrange(**policy_inputs(micro)).weights):
            yield

    @contextmanager
    def _recording(self, key: int) -> Iterator[None]:
        if not self.settings.router_replay:
            yield
            return
        with record_choices(self.plain.plain, self.plain.layers) as routes:
            yield
        self.routes[key] = routes

    def _statistics(self, micro: PolicyBatch, *, with_entropy_gradient: bool = False) -> TokenStatistics:
        return statistics_of(
            self.policy,
            micro,
            temperature=self.settings.temperature,
            with_entropy_gradient=with_entropy_gradient,
            with_mean_vocab="mean-vocab-logprobs" in self.algorithm.needs,
        )
