"""What an optimizer step makes smaller: the method's loss, its regularizer, and terms of the trainer."""

# B completions, L positions

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from .algorithm import Algorithm, MethodContext, Reduction, TokenStatistics
from .batch import PolicyBatch
from .reduction import Counts, count, reduce_loss
from .settings import PolicySettings
from .step_metrics import add_update_metrics
from .sums import Sums
from .surrogate import k3


@dataclass(frozen=True, kw_only=True)
class MiniBatchCounts:
    """Of a mini-batch on all processes, which every share of its loss is divided by.

    Attributes:
        policy: Of the policy loss.
        regularizer: Of the regularizer.
        parts: Micro-batches of all processes.
    """

    policy: Counts
    regularizer: Counts
    parts: int


@dataclass(kw_only=True)
class Objective:
    """Losses of micro-batches, which add up to that of their mini-batch however it is cut.

    Attributes:
        accelerator: Divides mini-batches.
        algorithm: What is minimised.
        settings: Of the terms that every method may have.
    """

    accelerator: Accelerator
    algorithm: Algorithm
    settings: PolicySettings

    def counts(self, micros: Sequence[PolicyBatch]) -> MiniBatchCounts:
        """Of a mini-batch; every process calls it with its part."""
        longest = self.settings.max_completion_length
        table_24 = torch.stack([self._counts_of(micro, longest) for micro in micros]).sum(0)
        total = self.accelerator.reduce(table_24, reduction="sum")
        assert isinstance(total, Tensor)
        policy, regularizer = (Counts(tokens=t[0], sequences=t[1], max_length=longest) for t in total)
        return MiniBatchCounts(
            policy=policy, regularizer=regularizer, parts=len(micros) * self.accelerator.num_processes
        )

    def _counts_of(self, micro: PolicyBatch, longest: int) -> Tensor:
        is_policy_B = ~micro.is_rehearsal
        is_regularized_B = micro.is_rehearsal if self._regularizes_rehearsal else is_policy_B
        found = (
            count(micro.policy_mask, is_policy_B, longest),
            count(self._regularized_mask(micro), is_regularized_B, longest),
        )
        return torch.stack([torch.stack([counts.tokens, counts.sequences]) for counts in found])

    def loss(
        self,
        now: TokenStatistics,
        micro: PolicyBatch,
        counts: MiniBatchCounts,
        context: MethodContext,
        sums: Sums,
    ) -> Tensor:
        """A micro-batch's share.

        Args:
            now: Of the policy in training, with gradient.
            micro: With advantages; without old log-probs, the present ones are the old ones.
            counts: Of the mini-batch.
            context: For the method.
            sums: Metrics are added to it.
        """
        if micro.old_logprobs is None:
            micro = micro.with_(old_logprobs=now.logprobs.detach(), old_entropies=now.entropies.detach())
        mask_BL = micro.policy_mask
        found = self.algorithm.bound("policy_loss")(now, micro, context)  # pyright: ignore[reportOptionalCall]
        loss = reduce_loss(found.values, mask_BL, self.algorithm.reduction, counts.policy)
        sums.add("policy_loss", loss, 1 / counts.parts)
        add_update_metrics(sums, now, micro, mask_BL, found.metrics, has_reference=self._has_reference)
        if (penalties_BL := self._penalties(now, micro)) is not None:
            loss = loss + reduce_loss(penalties_BL, mask_BL, self._penalty_reduction, counts.policy)
        if self.algorithm.regularizer is not None:
            loss = loss + self._regularizer(now, micro, counts, context, sums)
        if now.router_loss is not None:
            loss = loss + self.settings.router_aux_loss_coef * now.router_loss / counts.parts
            sums.add("aux_loss", now.router_loss, 1)
        return loss

    @property
    def _has_reference(self) -> bool:
        return self.settings.beta > 0 or "reference" in self.algorithm.needs

    def _penalties(self, now: TokenStatistics, micro: PolicyBatch) -> Tensor | None:
        """The divergence from the reference and the entropy bonus, which any method can have."""
        beta, coefficient = self.settings.beta, self.settings.entropy_coef
        if not (beta or coefficient):
            return None
        values_BL = torch.zeros_like(now.logprobs)
        if beta:
            values_BL = values_BL + beta * k3(now.logprobs, micro.required("ref_logprobs"))
        return values_BL - coefficient * now.entropies if coefficient else values_BL

    @property
    def _penalty_reduction(self) -> Reduction:
        """The method's, but a mean in any case: the weight of a sum would depend on the size of the step."""
        return "token-mean" if self.algorithm.reduction == "token-sum" else self.algorithm.reduction

    def _regularizer(
        self,
        now: TokenStatistics,
        micro: PolicyBatch,
        counts: MiniBatchCounts,
        context: MethodContext,
        sums: Sums,
    ) -> Tensor:
        found = self.algorithm.bound("regularizer")(now, micro, context)  # pyright: ignore[reportOptionalCall]
        mask_BL = self._regularized_mask(micro)
        loss = reduce_loss(found.values, mask_BL, self.algorithm.regularizer_reduction, counts.regularizer)
        sums.add("regularizer_loss", loss, 1 / counts.parts)
        sums.add_tokens(found.metrics, mask_BL)
        return loss

    @property
    def _regularizes_rehearsal(self) -> bool:
        return "rehearsal" in self.algorithm.needs

    def _regularized_mask(self, micro: PolicyBatch) -> Tensor:
        return micro.rehearsal_mask if self._regularizes_rehearsal else micro.policy_mask
