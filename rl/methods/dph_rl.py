"""DPH-RL: stored completions of the initial policy are rehearsed under a mass-covering divergence."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..surrogate import MAX_LOG_RATIO

Divergence = Literal["forward", "js", "alpha"]


def generator(
    log_ratios: Float[Tensor, "*shape"], divergence: Divergence, alpha: float
) -> Float[Tensor, "*shape"]:
    """f(u) for each token, from ``d = log u``; 0 with gradient 0 at ``u = 1``.

    ``forward``: ``u - 1 - log u``. ``js``: ``u log u - (u + 1) log((u + 1) / 2)``, twice the Jensen-Shannon
    divergence. ``alpha``: ``(u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1))``.

    Args:
        log_ratios: d.
        divergence: Which f.
        alpha: Of ``alpha``; near 0 it is the reverse KL divergence, near 1 the forward one.

    Raises:
        ValueError: alpha is not in (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must be between 0 and 1, both excluded")
    if divergence == "forward":
        return log_ratios.expm1() - log_ratios
    if divergence == "js":
        ratios = log_ratios.exp()
        return log_ratios * ratios - (ratios + 1) * (softplus(log_ratios) - math.log(2))
    rest = 1 - alpha
    return (rest * log_ratios.expm1() - (rest * log_ratios).expm1()) / (alpha * rest)


def regularizer(
    now: TokenStatistics,
    batch: PolicyBatch,
    context: MethodContext,
    *,
    divergence: Divergence = "forward",
    eta: float = 0.01,
    alpha: float = 0.2,
) -> TokenLoss:
    """``eta f(pi_theta / pi_ref)`` on the tokens of rehearsal rows.

    Args:
        now: Of the policy in training.
        batch: Rehearsal rows have their stored log-probs in ``ref_logprobs``.
        context: Not read.
        divergence: See `generator`.
        eta: Weight; in the paper 0.01-0.05 for ``forward`` and ``alpha``, 0.05-0.2 for ``js``.
        alpha: See `generator`.

    *Departs from the released code*: each token is treated by its own row's kind, not by that of the first
    row of a micro-batch, and only ratios above e^20 are cut off: the forward divergence also pulls back
    tokens that are almost lost. The divergence to a mixture with a live reference is not offered.

    Reference: The Choice of Divergence (ICLR 2026), arXiv:2509.07430.
    """
    mask_BL = batch.rehearsal_mask
    reference_BL = now.logprobs.detach() if batch.ref_logprobs is None else batch.ref_logprobs
    log_ratios_BL = torch.where(mask_BL, now.logprobs - reference_BL, 0.0).clamp(max=MAX_LOG_RATIO)
    values_BL = generator(log_ratios_BL, divergence, alpha)
    metrics = {"rehearsal/divergence": values_BL.detach(), "rehearsal/log_ratio": log_ratios_BL.detach()}
    return TokenLoss(values=eta * values_BL, metrics=metrics)
