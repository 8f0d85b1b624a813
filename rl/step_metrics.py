"""What is shown of a step: rewards, lengths, signs of a collapse. Names are TRL's where TRL has them."""

# B completions, L positions, G completions of a group

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .algorithm import TokenStatistics
from .batch import PolicyBatch
from .group_statistics import is_judged
from .sums import Sums
from .surrogate import k3


def add_rollout_metrics(sums: Sums, batch: PolicyBatch) -> None:
    """Rewards, lengths and variety of the completions that the policy wrote."""
    own = ~batch.is_rehearsal & ~batch.is_external
    judged = is_judged(batch) & own
    sums.add_rows("reward", batch.rewards, judged)
    for name, values in batch.rewards_by_function.items():
        sums.add_rows(f"rewards/{name}/mean", values, own)
    lengths = batch.lengths.float()
    sums.add_rows("completions/mean_length", lengths, own)
    sums.add_rows("completions/mean_terminated_length", lengths, own & ~batch.is_truncated)
    sums.add_rows("completions/clipped_ratio", batch.is_truncated.float(), own)
    for ids in _groups(batch, own):
        rewards = batch.rewards[ids][judged[ids]]
        distinct = len({tuple(row[mask].tolist()) for row, mask in _completions(batch, ids)})
        sums.add("completions/distinct", torch.tensor(float(distinct)), len(ids))
        if len(rewards) > 1:
            sums.add("reward_std", rewards.std(), 1)
            sums.add("frac_reward_zero_std", (rewards.max() == rewards.min()).float(), 1)


def _groups(batch: PolicyBatch, own: Bool[Tensor, " B"]) -> list[Tensor]:
    """Rows of each group."""
    rows = own.nonzero().squeeze(1)
    return [rows[batch.group_ids[rows] == group] for group in batch.group_ids[rows].unique()]


def _completions(batch: PolicyBatch, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch.completion_ids[rows], batch.token_mask[rows], strict=True))


def add_update_metrics(
    sums: Sums,
    now: TokenStatistics,
    batch: PolicyBatch,
    mask: Bool[Tensor, "B L"],
    metrics: Mapping[str, Float[Tensor, "B L"]],
    *,
    has_reference: bool = False,
) -> None:
    """Of a micro-batch in an update: entropy, its covariance term, divergences, and the method's own numbers.

    Args:
        sums: Are added to.
        now: Of the policy in training.
        batch: With advantages and old log-probs.
        mask: Tokens that the loss counts.
        metrics: The method's.
        has_reference: Whether every completion has log-probs of a reference, not rehearsal alone.
    """
    own = mask & ~batch.is_external[:, None]
    logprobs, advantages = now.logprobs.detach(), batch.required("advantages")
    shown = {
        "entropy": now.entropies.detach(),
        "covariance/logprob": logprobs,
        "covariance/advantage": advantages,
        "covariance/product": logprobs * advantages,
        "kl_to_old": k3(logprobs, batch.required("old_logprobs")),
    }
    if has_reference:
        shown["kl"] = k3(logprobs, batch.required("ref_logprobs"))
    sums.add_tokens(shown, own)
    sums.add_tokens(metrics, mask)
    if (sampled := batch.sampling_logprobs) is not None:
        gap = (batch.required("old_logprobs") - sampled).abs()
        # Forced tokens have 0 there: nobody sampled them.
        sums.add_tokens({"sampling/logprob_difference": gap}, own & (sampled != 0))


def finish_covariance(means: dict[str, float]) -> dict[str, float]:
    """Cov(log pi, A) over tokens, which drives the entropy down (arXiv:2505.22617), in place of its parts."""
    names = ("covariance/product", "covariance/logprob", "covariance/advantage")
    if not all(name in means for name in names):
        return means
    product, logprob, advantage = (means.pop(name) for name in names)
    return means | {"entropy_covariance": product - logprob * advantage}
