"""The head that hears the teacher and is thrown away: linear, or a narrow bottleneck."""

# D feature width, R bottleneck width, C classes

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from .task_head import TaskHead


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryHeadSpec:
    """What an auxiliary head looks like; enough to build it again.

    Raises:
        ValueError: A kind or norm that does not exist, or a width or dropout out of range.
    """

    kind: str = "bottleneck"
    """``linear`` (teacher and student of one family), ``bottleneck`` (of different ones), or ``copy``, a
    linear map that begins as the task head."""
    width: int = 200
    """R of the bottleneck; 200 in the paper, for every model."""
    dropout: float = 0.1
    """Of the bottleneck."""
    norm: str = "auto"
    """Of the bottleneck: ``batch`` as in the paper, for one feature an example; ``rms`` for tokens, whose
    number and padding batch statistics would depend on; or ``none``. ``auto`` is ``batch`` or ``rms``, by
    what the task head reads. With ``batch`` the loss depends on how a batch is cut into micro-batches."""

    def __post_init__(self) -> None:
        """Check everything."""
        kinds, norms = ("linear", "bottleneck", "copy"), ("auto", "batch", "rms", "none")
        if self.kind not in kinds:
            raise ValueError(f"auxiliary head kind={self.kind!r} is not one of {', '.join(kinds)}")
        if self.norm not in norms:
            raise ValueError(f"auxiliary head norm={self.norm!r} is not one of {', '.join(norms)}")
        if type(self.width) is not int or self.width < 1:
            raise ValueError(f"auxiliary head width={self.width!r} is not an integer of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"auxiliary head dropout={self.dropout!r} is not in [0, 1)")


def build_auxiliary_head(head: TaskHead, spec: AuxiliaryHeadSpec, num_classes: int) -> nn.Module:
    """Make an auxiliary head for the features of a task head, on its device and in its dtype.

    ``linear`` is ``W h + b``; ``bottleneck`` is ``W2 relu(norm(dropout(W1 h + b1))) + b2``.

    Args:
        head: Whose features it reads.
        spec: What it looks like.
        num_classes: C of the teacher.

    Raises:
        ValueError: ``copy`` for a teacher with another number of classes, or ``batch`` for tokens.

    Reference: Yang et al., Dual-Head Knowledge Distillation (KDD 2025), arXiv:2411.08937.

    *Departs from the paper*: `RMSNorm` for tokens. The released code has the width as a constant. A batch of
    one example, such as the last of an epoch may be, is normalised by the running statistics.
    """
    like = head.linear.weight
    where: Any = {"device": like.device, "dtype": like.dtype}
    if spec.kind == "linear":
        return nn.Linear(head.num_features, num_classes, **where)
    if spec.kind == "copy":
        return _copy(head, num_classes)
    return nn.Sequential(
        nn.Linear(head.num_features, spec.width, **where),
        nn.Dropout(spec.dropout),
        _norm(head, spec)(spec.width, **where),
        nn.ReLU(),
        nn.Linear(spec.width, num_classes, **where),
    )


def has_batch_norm(head: nn.Module) -> bool:
    """Whether what an auxiliary head says of an example depends on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in head.modules())


def _copy(head: TaskHead, num_classes: int) -> nn.Linear:
    if num_classes != head.num_classes:
        raise ValueError(
            f"kind='copy' needs a teacher with the student's {head.num_classes} classes, not {num_classes}; "
            "use kind='linear'"
        )
    like = head.linear.weight
    has_bias = head.linear.bias is not None
    copied = nn.Linear(head.num_features, num_classes, bias=has_bias, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        for ours, theirs in zip(copied.parameters(), head.linear.parameters(), strict=True):
            ours.copy_(theirs)
    return copied


def _norm(head: TaskHead, spec: AuxiliaryHeadSpec) -> type[nn.Module]:
    if spec.norm == "batch" and head.reads_tokens:
        raise ValueError(
            "norm='batch' is for one feature an example, and this student has one for each token, padding "
            "included; use norm='rms'"
        )
    chosen = ("rms" if head.reads_tokens else "batch") if spec.norm == "auto" else spec.norm
    return {"batch": _BatchNorm, "rms": _RMSNorm, "none": nn.Identity}[chosen]


class _RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """Normalise in the weight's dtype, which autocast leaves as it is."""
        return super().forward(x.to(self.weight.dtype))


class _BatchNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        """Normalise; one example alone has no deviation."""
        if self.training and len(input) == 1:
            return batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)
