"""BinaryKL-Norm in chunks of rows and columns: no softmax, so no sum over the vocabulary."""

# R rows, C columns

from torch import Tensor
from torch.nn.functional import softshrink

from ..losses.centring import CENTRES
from ..losses.checks import check_choice, check_temperature
from ..losses.class_reduction import REDUCTIONS
from .objective import Objective, Rule, Tile

FAR = 20.0
"""From here on ``log cosh x`` is a straight line, in any precision."""


def binary_kl_norm(*, temperature: float = 2.0, center: str = "none", reduction: str = "sum") -> Objective:
    """``tau^2 sum_k log cosh((s_k - t_k) / (2 tau))``, with the derivative ``(tau / 2) tanh(...)``.

    Separable, so tiles of a few columns do, and the weight's gradient is written once. Centring by the mean
    keeps that: the mean logit is one product with the mean row of the weight, exactly. Behind a softcap that
    does not hold, and whole rows are taken; so are they for ``logprob``, and in a sum with other losses.

    Args:
        temperature: tau, half the difference at which the square turns into a straight line.
        center: What is taken off each row's logits on both sides first: ``none`` (the paper), ``mean`` of the
            row, or ``logprob``, its log-sum-exp at temperature 1.
        reduction: ``sum`` over columns (the paper) or ``mean``.

    Raises:
        ValueError: An argument out of its range.

    Reference: Yang et al., Dual-Head Knowledge Distillation (KDD 2025), arXiv:2411.08937.

    *Departs from the paper*: centring and the mean are offered beside its own, and nothing is clamped.
    """
    check_temperature(temperature)
    check_choice("center", center, tuple(CENTRES))
    check_choice("reduction", reduction, REDUCTIONS)
    plain = _rule(temperature, reduction)
    if center == "none":
        return Objective(rule=plain, column_rule=plain)
    if center == "mean":
        return Objective(rule=_with_mean(plain), column_rule=plain, is_centred=True)
    return Objective(rule=_with_log_probabilities(plain))


def log_cosh_sum(x_RC: Tensor) -> Tensor:
    """``sum_k log cosh x_k`` of each row, exact at any magnitude: ``log1p(sinh^2 x) / 2``, then a line."""
    near_RC = x_RC.clamp(-FAR, FAR).sinh_()
    near_R = near_RC.mul_(near_RC).log1p_().sum(-1).mul_(0.5)
    return near_R.add_(softshrink(x_RC, FAR).abs_().sum(-1))


def _rule(temperature: float, reduction: str) -> Rule:
    def rule(tile: Tile) -> tuple[Tensor, Tensor]:
        factor = 1 / tile.num_columns if reduction == "mean" else 1.0
        x_RC = (tile.student - tile.teacher).mul_(1 / (2 * temperature))
        loss_R = log_cosh_sum(x_RC).mul_(temperature**2 * factor)
        return loss_R, x_RC.tanh_().mul_(temperature / 2 * factor)

    return rule


def _with_mean(plain: Rule) -> Rule:
    def rule(tile: Tile) -> tuple[Tensor, Tensor]:
        ours_RC, theirs_RC = (side - side.mean(-1, keepdim=True) for side in (tile.student, tile.teacher))
        loss_R, gradient_RC = plain(Tile(ours_RC, theirs_RC, tile.labels, tile.num_columns))
        return loss_R, gradient_RC.sub_(gradient_RC.mean(-1, keepdim=True))

    return rule


def _with_log_probabilities(plain: Rule) -> Rule:
    def rule(tile: Tile) -> tuple[Tensor, Tensor]:
        log_s_RC, log_t_RC = tile.student.log_softmax(-1), tile.teacher.log_softmax(-1)
        loss_R, gradient_RC = plain(Tile(log_s_RC, log_t_RC, tile.labels, tile.num_columns))
        return loss_R, gradient_RC.addcmul_(log_s_RC.exp_(), gradient_RC.sum(-1, keepdim=True), value=-1)

    return rule
