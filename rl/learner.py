"""What a step's completions teach: statistics before the updates, advantages, and the updates."""

# B completions, L positions

from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from .algorithm import Algorithm, MethodContext
from .batch import PolicyBatch
from .checkpoint import RunState
from .mini_batches import mini_batches
from .passes import PolicyPasses
from .settings import PolicySettings
from .stopwatch import Stopwatch
from .sums import Sums
from .updates import PolicyUpdater


@dataclass(kw_only=True)
class Learner:
    """Turns the completions of a step into optimizer steps.

    Attributes:
        accelerator: Divides the completions.
        algorithm: The method.
        settings: How.
        passes: Of the policy.
        updater: Takes the optimizer steps.
    """

    accelerator: Accelerator
    algorithm: Algorithm
    settings: PolicySettings
    passes: PolicyPasses
    updater: PolicyUpdater

    def learn(self, batch: PolicyBatch, state: RunState, sums: Sums, watch: Stopwatch) -> None:
        """Update the policy, or note that there is nothing to learn; every process calls it.

        Args:
            batch: Of this process.
            state: Updates or skipped steps are counted in it, and the method remembers there.
            sums: Metrics are added to it.
            watch: Notes the time.

        Raises:
            NonFiniteError: A gradient is NaN or infinite.
        """
        parts = mini_batches(batch, self.settings.mini_batches, self.settings.micro_batch_size)
        if self.passes.needs_old:
            batch = self.passes.with_old(batch, parts)
        batch = self.passes.with_reference(batch, parts)
        watch.lap("old_logprobs")
        updates = 0
        if (context := self._context(batch, state)) is not None:
            batch = batch.with_(advantages=self._advantages(batch, context))
            if self._teaches(batch):
                updates = self.updater.update(batch, parts, context, sums, state.updates)
        state.updates += updates
        state.skipped += not updates
        watch.lap("updates")

    def _context(self, batch: PolicyBatch, state: RunState) -> MethodContext | None:
        """With what the method has observed of this step; ``None`` if no token counts on any process."""
        mask_BL = batch.policy_mask
        entropies_BL = torch.zeros(1) if batch.old_entropies is None else batch.old_entropies[mask_BL]
        total, count = self._added(entropies_BL.double().sum(), mask_BL.sum().double())
        if not count:
            return None
        context = MethodContext(
            step=state.step,
            total_steps=self.settings.steps,
            max_completion_length=self.settings.max_completion_length,
            mean_entropy=None if batch.old_entropies is None else total / count,
            state=state.method,
        )
        if (observe := self.algorithm.bound("observe")) is not None:
            observe(context)
        return context

    def _advantages(self, batch: PolicyBatch, context: MethodContext) -> Tensor:
        """``[B, L]``, 0 outside of the policy's tokens."""
        found = self.algorithm.bound("advantage")(batch, context)  # pyright: ignore[reportOptionalCall]
        wide_BL = found[:, None].expand(batch.completion_ids.shape) if found.ndim == 1 else found
        return torch.where(batch.policy_mask, wide_BL.float(), 0.0)

    def _teaches(self, batch: PolicyBatch) -> bool:
        """Whether some process has an advantage, or another loss is there."""
        if self._has_other_losses:
            return True
        (total,) = self._added(batch.required("advantages").double().abs().sum())
        return total != 0  # NaN too, so that the update refuses it

    @cached_property
    def _has_other_losses(self) -> bool:
        weights = self.settings.beta, self.settings.entropy_coef, self.settings.router_aux_loss_coef
        return any(weights) or self.algorithm.regularizer is not None

    def _added(self, *values: Tensor) -> list[float]:
        """Sums over the processes."""
        total = self.accelerator.reduce(torch.stack(values).to(self.accelerator.device), reduction="sum")
        return total.tolist()  # pyright: ignore[reportAttributeAccessIssue]
