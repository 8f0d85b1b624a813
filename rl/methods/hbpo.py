"""HBPO: parts of a group are told different token budgets, and rewarded for what they need of them."""

from typing import Any

from torch import Tensor

from ..algorithm import MethodContext
from ..batch import PolicyBatch
from ..budget_reward import best_reward, budget_reward
from ..group_statistics import group_mean, is_judged, z_scores
from ..rollout import Prompt, Request


def shaper(
    prompt: Prompt,
    num_generations: int,
    tokenizer: Any,
    max_completion_length: int,
    *,
    budgets: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 5 / 8),
    budget_prefix: str = "I will answer the question within {budget} tokens",
    train_on_budget_prefix: bool = True,
) -> list[Request]:
    """An equal part of the group for each budget, its completions beginning with a sentence that names it.

    Args:
        prompt: If its template opens no think tag, put one into the prefix.
        num_generations: G.
        tokenizer: Of the policy.
        max_completion_length: L, tokens.
        budgets: Shares of L; the paper's 512, 1024, 2048 and 2560 of 4096.
        budget_prefix: The sentence.
        train_on_budget_prefix: Whether the loss counts its tokens, as in the released code.

    Raises:
        ValueError: G cannot be divided among the budgets, or a setting makes no sense.
    """
    if not budgets or len(set(budgets)) < len(budgets) or not all(0 < share <= 1 for share in budgets):
        raise ValueError(f"budgets={budgets} must be different shares of the length limit, in (0, 1]")
    if num_generations % len(budgets):
        raise ValueError(
            f"{num_generations} completions cannot be divided among {len(budgets)} budgets; use a multiple"
        )
    if "{budget}" not in budget_prefix:
        raise ValueError(f"budget_prefix={budget_prefix!r} has no {{budget}}, where the number belongs")
    requests = []
    for budget in (max(1, round(share * max_completion_length)) for share in budgets):
        text = budget_prefix.replace("{budget}", str(budget))
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        num_samples, trains = num_generations // len(budgets), train_on_budget_prefix
        requests.append(Request(num_samples=num_samples, forced_ids=ids, trains_forced=trains, budget=budget))
    return requests


def advantage(
    batch: PolicyBatch, context: MethodContext, *, intra_weight: float = 1.0, reward_scale: float = 4.0
) -> Tensor:
    """``z(R)_i + intra_weight (mean_{same budget} R - f2(b_i))``, ``[B]``; see `budget_reward` for R and f2.

    The second term is never above 0, so advantages are not centred; if all answers of a group are wrong, all
    are pushed down. A completion is correct if its reward in the data's sense is above 0.

    Args:
        batch: Of whole groups, with budgets.
        context: Knows L.
        intra_weight: 2 reproduces the released code, which adds the term twice.
        reward_scale: beta of the reward.

    Reference: Lyu et al., Hierarchical Budget Policy Optimization, arXiv:2507.15844.
    """
    counts_B, length = is_judged(batch), context.max_completion_length
    if bool((counts_B & (batch.budgets < 1)).any()):
        raise ValueError("HBPO compares completions that were told a budget, and some were told none")
    budgets_B, lengths_B = batch.budgets.to(batch.rewards.dtype), batch.lengths.to(batch.rewards.dtype)
    rewards_B = budget_reward(batch.rewards > 0, lengths_B, budgets_B, length, reward_scale)
    subgroups_B = batch.group_ids * (batch.budgets.max() + 1) + batch.budgets.clamp_min(0)
    intra_B = group_mean(rewards_B, subgroups_B, counts_B) - best_reward(budgets_B, length, reward_scale)
    inter_B = z_scores(rewards_B, batch.group_ids, counts_B, epsilon=1e-6)
    return (inter_B + intra_weight * intra_B).where(counts_B, 0.0)
