"""Gradients of a head, added up tile by tile in single precision at least."""

# N rows, V rows of the weight, D hidden width; R rows and C columns of a tile

import torch
from jaxtyping import Float
from torch import Tensor

from .heads import Head, wide
from .tiles import even_slices

PRODUCT_COLUMNS = 8192
"""Columns of the weight's gradient that are made at once where they cannot be added in place."""


class Gradients:
    """Sums over tiles of the gradients by hidden states, weight and bias.

    Args:
        hidden: The student's, in the products' dtype.
        head: The student's.
        wanted: Which of the three to compute.
        factor: The head's weight as it is multiplied with; its dtype may be another.
        scale: Factor of all of them.
        is_one_sum: Whether each row of the weight gets one product only, so that nothing is added up there.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "N D"],
        head: Head,
        wanted: tuple[bool, bool, bool],
        *,
        factor: Float[Tensor, "V D"],
        scale: float,
        is_one_sum: bool,
    ) -> None:
        self.states_ND, self.head, self.scale = hidden, head, scale * head.scale
        self.factor_VD, self.is_wanted = factor, any(wanted)
        total, weight = wide(hidden.dtype), head.weight
        weight_total = weight.dtype if is_one_sum else wide(weight.dtype)
        wants_hidden, wants_weight, wants_bias = wanted
        self.hidden_ND = hidden.new_zeros(hidden.shape, dtype=total) if wants_hidden else None
        self.weight_VD = weight.new_empty(weight.shape, dtype=weight_total) if wants_weight else None
        if self.weight_VD is not None:  # the rest is written before it is read: at V x D a pass that counts
            self.weight_VD[head.width if len(hidden) else 0 :].zero_()
        self.bias_V = weight.new_zeros(len(weight), dtype=total) if wants_bias else None

    def add(self, slope_RC: Float[Tensor, "R C"], rows: slice, columns: slice) -> None:
        """Add what comes from one tile.

        Args:
            slope_RC: Derivative by ``W h + b`` over the head's scale, in the products' dtype.
            rows: Of the tile.
            columns: Of the tile.
        """
        if self.hidden_ND is not None:
            is_first = columns.start == 0
            _add_product(self.hidden_ND[rows], slope_RC, self.factor_VD[columns], self.scale, is_first)
        if self.weight_VD is not None:
            total_CD, states_RD = self.weight_VD[columns], self.states_ND[rows]
            for some in even_slices(len(total_CD), PRODUCT_COLUMNS):
                _add_product(total_CD[some], slope_RC[:, some].T, states_RD, self.scale, rows.start == 0)
        if self.bias_V is not None:
            self.bias_V[columns].add_(slope_RC.sum(0, dtype=self.bias_V.dtype), alpha=self.scale)

    def centre_(self, slope_N: Float[Tensor, " N"], mean_weight_D: Float[Tensor, " D"]) -> None:
        """Take each row's mean over columns off the derivatives that were added, all at once.

        Args:
            slope_N: Sums over columns of what `add` was given.
            mean_weight_D: Mean row of the weight.
        """
        columns = slice(self.head.width)
        if self.hidden_ND is not None:
            self.hidden_ND.addr_(slope_N, mean_weight_D, alpha=-self.scale)
        slope_N = slope_N * (self.scale / self.head.width)
        if self.weight_VD is not None:
            mean_D = self.states_ND.to(slope_N.dtype).T @ slope_N
            self.weight_VD[columns].sub_(mean_D.to(self.weight_VD.dtype))
        if self.bias_V is not None:
            self.bias_V[columns].sub_(slope_N.sum())

    def finish(self, hidden: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Give the gradients in the dtypes of what they belong to."""
        bias = None if self.head.bias is None else self.head.bias.dtype
        totals = (self.hidden_ND, hidden), (self.weight_VD, self.head.weight.dtype), (self.bias_V, bias)
        by_hidden, by_weight, by_bias = (
            None if total is None else total.to(dtype) for total, dtype in totals
        )
        return by_hidden, by_weight, by_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float, is_first: bool) -> None:
    right = right.to(left.dtype)
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale, beta=0 if is_first else 1)
    elif is_first:
        total.copy_(left @ right).mul_(scale)
    else:
        total.add_(left @ right, alpha=scale)
