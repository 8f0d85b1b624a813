"""The losses by the names of the command line, and what each of them needs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .bild import bild
from .binary_kl import binary_kl
from .binary_kl_norm import binary_kl_norm
from .dkd import dkd
from .jsd import jsd
from .kl import kl, reverse_kl
from .logit_mse import logit_mse
from .skewed_kl import skewed_kl, skewed_reverse_kl
from .top_k_kl import top_k_kl
from .uld import uld


@dataclass(frozen=True, slots=True)
class LossMethod:
    """One loss."""

    function: Callable[..., Tensor]
    """``function(student_logits, teacher_logits, *, temperature)``: one loss for each row."""
    needs_labels: bool = False
    """Takes ``labels_N`` too."""
    needs_full_teacher: bool = True
    """Of every class; else a cache of the likeliest ones will do (`cached_top_k_kl`)."""
    needs_same_vocabulary: bool = True
    """Both sides have the same classes in the same order."""


LOSSES: dict[str, LossMethod] = {
    "bild": LossMethod(bild),
    "binary-kl": LossMethod(binary_kl),
    "binary-kl-norm": LossMethod(binary_kl_norm),
    "dkd": LossMethod(dkd, needs_labels=True),
    "jsd": LossMethod(jsd),
    "kl": LossMethod(kl),
    "mse": LossMethod(logit_mse),
    "reverse-kl": LossMethod(reverse_kl),
    "skewed-kl": LossMethod(skewed_kl),
    "skewed-reverse-kl": LossMethod(skewed_reverse_kl),
    "top-k-kl": LossMethod(top_k_kl, needs_full_teacher=False),
    "uld": LossMethod(uld, needs_same_vocabulary=False),
}
