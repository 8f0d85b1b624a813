"""Distillation losses: pure functions of student and teacher logits, one loss for each row.

Pack a batch with `valid_rows`, call a loss, take the `masked_mean`.
"""

from .bild import bild
from .binary_kl import binary_kl
from .binary_kl_norm import binary_kl_norm
from .centring import CENTRES, centred
from .class_reduction import REDUCTIONS, published_weight
from .dkd import dkd
from .jsd import jsd
from .kl import kl, reverse_kl
from .logit_mse import logit_mse
from .logits import drop_padded_columns, softcap
from .methods import LOSSES, LossMethod
from .rows import ValidRows, masked_mean, valid_rows, valid_tokens
from .skewed_kl import skewed_kl, skewed_reverse_kl
from .top_k_kl import cached_top_k_kl, top_k_kl
from .uld import uld

__all__ = [
    "CENTRES",
    "LOSSES",
    "REDUCTIONS",
    "LossMethod",
    "ValidRows",
    "bild",
    "binary_kl",
    "binary_kl_norm",
    "cached_top_k_kl",
    "centred",
    "dkd",
    "drop_padded_columns",
    "jsd",
    "kl",
    "logit_mse",
    "masked_mean",
    "published_weight",
    "reverse_kl",
    "skewed_kl",
    "skewed_reverse_kl",
    "softcap",
    "top_k_kl",
    "uld",
    "valid_rows",
    "valid_tokens",
]
