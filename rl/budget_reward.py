"""What a correct answer is worth by its length and by the length it was told (HBPO)."""

# B completions

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def best_reward(budgets_B: Float[Tensor, " B"], max_length: int, beta: float) -> Float[Tensor, " B"]:
    """``f2(b) = beta cos(pi b / 2L)``, what a correct answer within its budget earns."""
    return beta * torch.cos(math.pi * budgets_B / (2 * max_length))


def budget_reward(
    is_correct_B: Bool[Tensor, " B"],
    lengths_B: Float[Tensor, " B"],
    budgets_B: Float[Tensor, " B"],
    max_length: int,
    beta: float,
) -> Float[Tensor, " B"]:
    """``f2(b)`` within the budget, ``f1(n, b) = beta cos(pi n / 2L) - |n - b| / L`` beyond, 0 if wrong.

    Args:
        is_correct_B: By the verifier.
        lengths_B: n, tokens with the prefix.
        budgets_B: b, tokens.
        max_length: L; longer answers earn nothing.
        beta: Scale.

    *Departs from the code*: it takes the smaller of f1 and f2, and -1 for answers that cannot be read.

    Reference: Lyu et al., Hierarchical Budget Policy Optimization, arXiv:2507.15844.
    """
    excess_B = (lengths_B - budgets_B).abs() / max_length
    beyond_B = beta * torch.cos(math.pi * lengths_B / (2 * max_length)) - excess_B
    earned_B = torch.where(lengths_B > budgets_B, beyond_B, best_reward(budgets_B, max_length, beta))
    return torch.where(is_correct_B & (lengths_B <= max_length), earned_B, 0.0)
