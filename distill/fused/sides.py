"""Where a tile's logits come from, on either side."""

# N rows, D hidden width, C columns of all; R rows and c columns of a tile, r rows of a block

import torch
from jaxtyping import Float
from torch import Tensor

from .heads import Head, Teacher, TeacherStates, TopK, teacher_shape, wide

Cut = list[tuple[slice, slice]]
"""Rows and columns of each tile."""


class HeadSide:
    """Logits of hidden states, in one buffer for all tiles.

    Args:
        states: Hidden states, in the dtype of the product.
        head: Theirs.
        cut: All tiles.
    """

    def __init__(self, states: Float[Tensor, "N D"], head: Head, cut: Cut) -> None:
        self.states_ND, self.head = states, head
        most = max((_size(rows) * _size(columns) for rows, columns in cut), default=0)
        self.buffer = states.new_empty(most)

    def product(self, rows: slice, columns: slice) -> Float[Tensor, "R c"]:
        """``W h + b``."""
        shape = _size(rows), _size(columns)
        out_Rc = self.buffer[: shape[0] * shape[1]].view(shape)
        return self.head.product(self.states_ND[rows], columns, out_Rc)

    def logits(self, product_rc: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """Scaled and capped."""
        return self.head.finish(product_rc)


class LogitsSide:
    """Logits that exist already.

    Args:
        logits: Of all rows; with no columns, if there is no teacher.
    """

    def __init__(self, logits: Float[Tensor, "N C"]) -> None:
        self.logits_NC = logits

    def product(self, rows: slice, columns: slice) -> Float[Tensor, "R c"]:
        """A view."""
        return self.logits_NC[rows, columns]

    def logits(self, product_rc: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """As they are."""
        return product_rc.to(wide(product_rc.dtype))


Side = HeadSide | LogitsSide
"""`product` makes something of a whole tile at once, valid until the next call, and `logits`, block by block,
makes of that logits in single precision at least; they may be the same memory."""


def teacher_side(teacher: Teacher | None, student: HeadSide, cut: Cut, dtype: torch.dtype | None) -> Side:
    """Make a teacher's side.

    Args:
        teacher: ``None`` for logits without columns.
        student: The other side.
        cut: Its tiles; see `teacher_cut`.
        dtype: Of products under autocast; ``None`` for that of the teacher's hidden states.
    """
    if isinstance(teacher, TeacherStates):
        states = teacher.hidden.detach().to(dtype or teacher.hidden.dtype)
        return HeadSide(states, teacher.head.cast(states.dtype), cut)
    if isinstance(teacher, TopK):
        return LogitsSide(teacher.log_probs)
    return LogitsSide(student.states_ND[:, :0] if teacher is None else teacher)


def teacher_cut(teacher: Teacher | None, cut: Cut, *, whole_rows: bool) -> Cut:
    """Cut the teacher as the student is cut: whole rows are those of its own columns."""
    if teacher is None or not whole_rows:
        return cut
    columns = slice(0, teacher_shape(teacher)[1])
    return [(rows, columns) for rows, _ in cut]


def _size(part: slice) -> int:
    return part.stop - part.start
