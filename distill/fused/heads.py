"""What turns hidden states into logits, on either side."""

# N rows, V rows of the weight, C real columns of the logits, D hidden width

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """``z = c tanh(a (W h + b) / c)`` over the first C columns; without a cap ``z = a (W h + b)``.

    Raises:
        ValueError: Shapes that do not fit, or a number out of its range.

    Reference: the cap is of Gemma 2, arXiv:2408.00118, section 2.
    """

    weight: Float[Tensor, "V D"]
    """W."""
    bias: Float[Tensor, " V"] | None = None
    """b."""
    softcap: float | None = None
    """c, ``final_logit_softcapping`` of the model's configuration."""
    scale: float = 1.0
    """a: Cohere's ``logit_scale``, or one over Granite's ``logits_scaling``."""
    num_columns: int | None = None
    """C, the tokens that the tokenizer knows; the weight's further rows only pad it. ``None`` for all."""

    def __post_init__(self) -> None:
        """Check everything."""
        if self.weight.ndim != 2:
            raise ValueError(f"the head's weight has shape {tuple(self.weight.shape)}, not [V, D]")
        rows = self.weight.shape[0]
        if self.bias is not None and tuple(self.bias.shape) != (rows,):
            raise ValueError(f"the head's bias has shape {tuple(self.bias.shape)}; its weight needs [{rows}]")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap} is not a finite number above 0; None leaves it out")
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} is not a finite number other than 0; 1 leaves it out")
        if self.num_columns is not None and not 1 <= self.num_columns <= rows:
            raise ValueError(f"num_columns={self.num_columns} is not between 1 and the weight's {rows} rows")

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        *,
        softcap: float | None = None,
        scale: float = 1.0,
        num_columns: int | None = None,
    ) -> "Head":
        """Describe a linear layer, whose parameters it shares."""
        bias: Tensor | None = linear.bias
        return cls(weight=linear.weight, bias=bias, softcap=softcap, scale=scale, num_columns=num_columns)

    @property
    def width(self) -> int:
        """C."""
        return self.weight.shape[0] if self.num_columns is None else self.num_columns

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same with another dtype of weight and bias, which are copied if they have not got it."""
        if self.weight.dtype == dtype:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def to(self, device: torch.device) -> "Head":
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def product(
        self, hidden_ND: Float[Tensor, "N D"], columns: slice, out: Float[Tensor, "N c"]
    ) -> Float[Tensor, "N c"]:
        """``W h + b`` of some columns, written to ``out``, in the hidden states' dtype."""
        weight_cD = self.weight[columns].to(hidden_ND.dtype)
        if self.bias is None:
            return torch.mm(hidden_ND, weight_cD.T, out=out)
        return torch.addmm(self.bias[columns].to(hidden_ND.dtype), hidden_ND, weight_cD.T, out=out)

    def finish(self, product_NC: Float[Tensor, "N c"]) -> Float[Tensor, "N c"]:
        """Logits, in single precision or wider, of ``W h + b``, which is overwritten if it is so already."""
        logits = product_NC.to(wide(product_NC.dtype))
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits.mul_(self.scale) if self.scale != 1 else logits

    def through_cap_(
        self, gradient_NC: Float[Tensor, "N c"], logits_NC: Float[Tensor, "N c"]
    ) -> Float[Tensor, "N c"]:
        """Turn the gradient by logits, in place, into that by ``a (W h + b)``: times ``1 - (z / c)^2``."""
        if self.softcap is None:
            return gradient_NC
        return gradient_NC.addcmul_(gradient_NC * logits_NC, logits_NC, value=-1 / self.softcap**2)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherStates:
    """A teacher by its last hidden states, of which logits are made chunk by chunk.

    Cached, they are smaller than logits by V / D, and exact for every loss.

    Raises:
        ValueError: The states are not rows of the head's width.
    """

    hidden: Float[Tensor, "N D"]
    """One row for each of the student's; D may be another."""
    head: Head

    def __post_init__(self) -> None:
        """Check the shapes."""
        check_states("teacher", self.hidden, self.head)


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """A teacher by the likeliest tokens of each row."""

    log_probs: Float[Tensor, "N K"]
    """Of temperature 1, over all tokens."""
    ids: Int[Tensor, "N K"]


Teacher = Tensor | TeacherStates | TopK
"""Logits ``[N, C]``, hidden states with their head, or the likeliest tokens."""


def teacher_shape(teacher: Teacher) -> tuple[int, int]:
    """Rows and columns of what a teacher says."""
    if isinstance(teacher, TeacherStates):
        return len(teacher.hidden), teacher.head.width
    num_rows, num_columns = (teacher.ids if isinstance(teacher, TopK) else teacher).shape
    return num_rows, num_columns


def check_states(side: str, hidden: Tensor, head: Head) -> None:
    """Refuse hidden states that the head cannot read, with a ``ValueError``."""
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"the {side}'s hidden states have shape {tuple(hidden.shape)}; its head needs "
            f"[N, {head.weight.shape[1]}]: pack [batch, sequence, hidden] to the valid rows"
        )


def check_teacher(teacher: Teacher, num_rows: int, num_columns: int, *, compares_columns: bool) -> None:
    """Refuse a teacher of other rows or columns than the student's, with a ``ValueError``."""
    shape = teacher_shape(teacher)
    if shape[0] != num_rows or (compares_columns and shape[1] != num_columns):
        raise ValueError(
            f"the teacher's logits have shape {shape} and the student's {(num_rows, num_columns)}. Pack both "
            "with the same valid rows; if one vocabulary is only padded, give its head num_columns, or cut "
            "the teacher's logits"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least single precision."""
    return torch.promote_types(dtype, torch.float32)
