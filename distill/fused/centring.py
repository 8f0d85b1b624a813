"""The mean logit of each row without the logits, so that columns can be centred one tile at a time."""

# N rows, C columns, D hidden width; R rows and c columns of a tile

import torch
from jaxtyping import Float
from torch import Tensor

from .heads import Head, Teacher, TeacherStates, wide


class Means:
    """What is taken off a row's student logits, less what is taken off the teacher's, and what comes back.

    ``mean_k (W_k h + b_k) = (mean_k W_k) h + mean_k b_k``, exactly, where no cap follows.

    Attributes:
        shift_N: The difference of the two means.
        weight_D: Mean row of the student's weight.
        slope_N: Sum over columns of the derivatives, whose mean the centred derivatives lack.
    """

    def __init__(self, states: Float[Tensor, "N D"], head: Head, teacher: Teacher | None) -> None:
        self.weight_D = _mean_weight(head)
        self.shift_N = _mean_logits(states, head, self.weight_D)
        if isinstance(teacher, TeacherStates):
            self.shift_N -= _mean_logits(teacher.hidden, teacher.head, _mean_weight(teacher.head))
        elif isinstance(teacher, Tensor):
            self.shift_N -= teacher.mean(1, dtype=wide(teacher.dtype))
        self.slope_N = torch.zeros_like(self.shift_N)

    def add(self, slope_Rc: Float[Tensor, "R c"], rows: slice) -> None:
        """Add up a tile's derivatives."""
        self.slope_N[rows].add_(slope_Rc.sum(1, dtype=self.slope_N.dtype))


def _mean_weight(head: Head) -> Tensor:
    return head.weight[: head.width].mean(0, dtype=wide(head.weight.dtype))


def _mean_logits(states_ND: Tensor, head: Head, mean_weight_D: Tensor) -> Tensor:
    mean_N = states_ND.to(mean_weight_D.dtype) @ mean_weight_D
    if head.bias is not None:
        mean_N += head.bias[: head.width].mean(dtype=mean_N.dtype)
    return mean_N * head.scale
