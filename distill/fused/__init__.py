"""Distillation losses of hidden states and heads, in chunks: the logits of all rows at once never exist.

    from moekit.distill import fused

    head, teacher = fused.Head.of(model.lm_head), fused.TeacherStates(hidden, fused.Head.of(large.lm_head))
    loss = fused.fused_loss(states, head, fused.kl(temperature=2.0), teacher=teacher)

An objective bears the name of the dense loss in `moekit.distill.losses` that it equals; `by_rows` makes one
of any other dense loss.
"""

from collections.abc import Callable

from .binary_kl_norm import binary_kl_norm
from .by_rows import by_rows
from .chunked import fused_loss
from .cross_entropy import cross_entropy, cross_entropy_plus
from .heads import Head, Teacher, TeacherStates, TopK
from .jsd import jsd
from .kl import kl, reverse_kl, skewed_kl, skewed_reverse_kl
from .objective import Objective, Rule, Tile, weighted_sum

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "binary-kl-norm": binary_kl_norm,
    "jsd": jsd,
    "kl": kl,
    "reverse-kl": reverse_kl,
    "skewed-kl": skewed_kl,
    "skewed-reverse-kl": skewed_reverse_kl,
}
"""Those with a derivative written by hand, by the names of `moekit.distill.losses.LOSSES`."""

__all__ = [
    "OBJECTIVES",
    "Head",
    "Objective",
    "Rule",
    "Teacher",
    "TeacherStates",
    "Tile",
    "TopK",
    "binary_kl_norm",
    "by_rows",
    "cross_entropy",
    "cross_entropy_plus",
    "fused_loss",
    "jsd",
    "kl",
    "reverse_kl",
    "skewed_kl",
    "skewed_reverse_kl",
    "weighted_sum",
]
