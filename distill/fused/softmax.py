"""What the losses of two softmax distributions share."""

# R rows, C columns

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..losses.checks import check_temperature
from .objective import Objective, Tile

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of the log-probabilities of S and T, ``[R, C]``: its value, ``[R]``, and its derivative by z_s / tau."""


def softmax_objective(divergence: Divergence, temperature: float) -> Objective:
    """``tau^2`` times a divergence of S and T, the softmax of ``z / tau``.

    Raises:
        ValueError: tau is not a finite number above 0.
    """
    check_temperature(temperature)

    def log_softmax(logits_RC: Tensor) -> Tensor:
        return (logits_RC if temperature == 1 else logits_RC / temperature).log_softmax(-1)

    def rule(tile: Tile) -> tuple[Tensor, Tensor]:
        loss_R, gradient_RC = divergence(log_softmax(tile.student), log_softmax(tile.teacher))
        return loss_R * temperature**2, gradient_RC if temperature == 1 else gradient_RC.mul_(temperature)

    return Objective(rule=rule)


def expectation(p_RC: Float[Tensor, "R C"], values_RC: Float[Tensor, "R C"]) -> Float[Tensor, " R"]:
    """``sum_k p_k v_k`` without a tensor of the products."""
    return torch.linalg.vecdot(p_RC, values_RC)


def through_softmax_(slope_RC: Float[Tensor, "R C"], s_RC: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """``S_k (a_k - sum_j S_j a_j)``: the derivative by ``z / tau`` from the one by S; overwrites a."""
    return slope_RC.sub_(expectation(s_RC, slope_RC)[:, None]).mul_(s_RC)


def log_mixture(
    log_p_RC: Float[Tensor, "R C"], log_q_RC: Float[Tensor, "R C"], share: float
) -> Float[Tensor, "R C"]:
    """``log(a P + (1 - a) Q)``, also where both underflow."""
    log_a, log_b = math.log(share), math.log1p(-share)
    return torch.logaddexp(log_p_RC + log_a, log_q_RC + log_b)
