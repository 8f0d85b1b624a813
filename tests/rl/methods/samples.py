"""Batches of two groups with everything in them that a method may meet, and the loss of a mini-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moekit.rl.algorithm import Algorithm, MethodContext, SelectionInputs, TokenStatistics
from moekit.rl.algorithms import ALGORITHMS
from moekit.rl.batch import PolicyBatch
from moekit.rl.reduction import Counts, count, reduce_loss
from torch import Tensor

NUM_TOKENS, MAX_LENGTH = 7, 8
LENGTHS = torch.tensor([6, 4, 5, 3, 6, 2, 5, 4, 5, 3])
SETTINGS: dict[str, dict[str, Any]] = {
    "clip-cov": {"share": 1.0, "covariance_low": 0.05},
    "kl-cov": {"share": 0.2},
    "gtpo": {"tau": 1.7, "initial_entropy": 0.5},
    "dph-rl": {"eta": 0.7},
    "epo": {"entropy_weight": 0.3, "kappa_low": 0.9, "kappa_high": 1.1},
}
"""With which branches are reached on so few tokens, and nothing is drawn."""


def tiny_batch(ids: Tensor, token_mask: Tensor | None = None, **fields: Any) -> PolicyBatch:
    """Completions of one group unless ``fields`` say otherwise."""
    rows = len(ids)
    mask = torch.ones_like(ids, dtype=torch.bool) if token_mask is None else token_mask
    values: dict[str, Any] = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.bool),
        "completion_ids": ids,
        "token_mask": mask,
        "loss_mask": mask,
        "group_ids": torch.zeros(rows, dtype=torch.long),
        "rewards": torch.zeros(rows, dtype=torch.float64),
        "is_truncated": torch.zeros(rows, dtype=torch.bool),
        "is_external": torch.zeros(rows, dtype=torch.bool),
        "is_rehearsal": torch.zeros(rows, dtype=torch.bool),
        "budgets": torch.full((rows,), -1),
        "policy_versions": torch.zeros(rows, dtype=torch.long),
        "turn_indices": torch.zeros(rows, dtype=torch.long),
        "agents": torch.zeros(rows, dtype=torch.long),
    }
    return PolicyBatch(**{**values, **fields})


def context_of(
    *, step: int = 0, total_steps: int = 10, max_length: int = MAX_LENGTH, **more: Any
) -> MethodContext:
    return MethodContext(step=step, total_steps=total_steps, max_completion_length=max_length, **more)


def statistics(logits_BLV: Tensor, ids_BL: Tensor) -> TokenStatistics:
    """What a policy with these logits says of the tokens."""
    logprobs_BLV = logits_BLV.log_softmax(-1)
    return TokenStatistics(
        logprobs=logprobs_BLV.gather(2, ids_BL[..., None])[..., 0],
        entropies=-(logprobs_BLV.exp() * logprobs_BLV).sum(-1),
        mean_vocab_logprobs=logprobs_BLV.mean(-1),
    )


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LENGTHS), 6, NUM_TOKENS, generator=generator, dtype=torch.float64)


def raw_batch() -> PolicyBatch:
    """Two groups of four, with demonstrations, an unknown reward and a forced token; two rehearsal rows."""
    ids = torch.randint(NUM_TOKENS, (10, 6), generator=torch.Generator().manual_seed(3))
    ids[:4, :2], ids[4:8, 0] = torch.tensor([1, 2]), 5
    mask = torch.arange(6) < LENGTHS[:, None]
    loss_mask = mask.clone()
    loss_mask[2, 0] = False
    old, reference = statistics(logits(1), ids), statistics(logits(2), ids)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, torch.nan, 0.25, torch.nan, 1.0])
    is_rehearsal = torch.arange(10) >= 8
    return tiny_batch(
        ids,
        mask,
        loss_mask=loss_mask,
        rewards=rewards.double(),
        group_ids=torch.tensor([4, 4, 4, 4, 2, 2, 2, 2, 7, 9]),
        is_external=(torch.arange(10) % 4 == 3) & ~is_rehearsal,
        is_rehearsal=is_rehearsal,
        budgets=torch.tensor([1, 2, 4, 5, 1, 2, 4, 5, -1, -1]),
        old_logprobs=old.logprobs,
        old_entropies=old.entropies,
        old_mean_vocab_logprobs=old.mean_vocab_logprobs,
        ref_logprobs=reference.logprobs,
    )


def policy_logits() -> Tensor:
    """Of a policy some updates after the one that sampled."""
    return logits(1) + 0.6 * logits(8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An algorithm with a mini-batch that is ready for its loss."""

    algorithm: Algorithm
    batch: PolicyBatch
    context: MethodContext

    def token_loss(self, name: str, now: TokenStatistics, batch: PolicyBatch | None = None) -> Any:
        batch = self.batch if batch is None else batch
        return self.algorithm.bound(name)(now, batch, self.context)

    def loss(self, now: TokenStatistics, parts: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Of the mini-batch, added up over micro-batches as a trainer does."""
        total = torch.zeros((), dtype=torch.float64)
        names = {"policy_loss": self.algorithm.reduction, "regularizer": self.algorithm.regularizer_reduction}
        for rows in parts or [range(len(self.batch))]:
            micro = self.batch.select(list(rows))
            width = micro.completion_ids.shape[1]
            cut = TokenStatistics(
                **{name: value[list(rows), :width] for name, value in vars(now).items() if value is not None}
            )
            for name, reduction in names.items():
                if self.algorithm.bound(name) is not None:
                    found, mask = self.token_loss(name, cut, micro), self.mask(name, micro)
                    total = total + reduce_loss(found.values, mask, reduction, self.counts(name))
        return total

    def rehearses(self, name: str) -> bool:
        return name == "regularizer" and "rehearsal" in self.algorithm.needs

    def mask(self, name: str, batch: PolicyBatch) -> Tensor:
        return batch.rehearsal_mask if self.rehearses(name) else batch.policy_mask

    def counts(self, name: str) -> Counts:
        batch = self.batch
        is_counted = batch.is_rehearsal if self.rehearses(name) else ~batch.is_rehearsal
        return count(self.mask(name, batch), is_counted, MAX_LENGTH)


def case(
    name: str, batch: PolicyBatch | None = None, now: TokenStatistics | None = None, **settings: Any
) -> Case:
    """Observed twice, with advantages and selection.

    Args:
        name: Of the algorithm.
        batch: `raw_batch` by default.
        now: The policy that a selection looks at.
        settings: Beside those of ``SETTINGS``.
    """
    algorithm = ALGORITHMS[name].with_settings(**{**SETTINGS.get(name, {}), **settings})
    batch = raw_batch() if batch is None else batch
    context = context_of(step=3, mean_entropy=float(batch.old_entropies[batch.policy_mask].mean()))
    if (observe := algorithm.bound("observe")) is not None:
        observe(context)
        observe(context)
    found = algorithm.bound("advantage")(batch, context)
    wide = found if found.ndim == 2 else found[:, None].expand(batch.completion_ids.shape)
    batch = batch.with_(advantages=wide)
    if (selection := algorithm.bound("selection")) is not None:
        now = statistics(policy_logits(), batch.completion_ids) if now is None else now
        mask = batch.policy_mask
        tokens = SelectionInputs(
            logprobs=now.logprobs.detach()[mask],
            old_logprobs=batch.old_logprobs[mask],
            advantages=batch.advantages[mask],
            generator=torch.Generator().manual_seed(0),
        )
        batch = batch.with_(selected=torch.zeros_like(mask).masked_scatter(mask, selection(tokens)))
    return Case(algorithm=algorithm, batch=batch, context=context)


def gradient(values, mask, logits, reduction="token-mean"):
    loss = reduce_loss(values, mask, reduction, count(mask, mask.any(1), 8))
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def on_policy(name, **settings):
    """The case of an algorithm whose old policy is the policy in training, and its statistics."""
    logits = policy_logits().requires_grad_()
    now = statistics(logits, raw_batch().completion_ids)
    batch = raw_batch().with_(
        old_logprobs=now.logprobs.detach(),
        old_entropies=now.entropies.detach(),
        old_mean_vocab_logprobs=now.mean_vocab_logprobs.detach(),
    )
    return case(name, batch, **settings), now, logits
