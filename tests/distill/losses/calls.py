"""Every loss with options that reach its branches, on small logits, and one way to call them all."""

from typing import Any

import torch
from moekit.distill.losses import LOSSES
from torch import Tensor

NUM_ROWS, NUM_CLASSES = 5, 11
LABELS = torch.tensor([0, 10, 3, 3, 7])

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bild": ("bild", {"k": 4}),
    "binary-kl": ("binary-kl", {}),
    "binary-kl centred": ("binary-kl", {"center": "mean", "reduction": "mean"}),
    "binary-kl-norm": ("binary-kl-norm", {}),
    "binary-kl-norm centred": ("binary-kl-norm", {"center": "mean"}),
    "binary-kl-norm of log-probabilities": ("binary-kl-norm", {"center": "logprob", "reduction": "mean"}),
    "dkd": ("dkd", {}),
    "jsd": ("jsd", {"beta": 0.3}),
    "jsd at 0": ("jsd", {"beta": 0.0}),
    "jsd at 1": ("jsd", {"beta": 1.0}),
    "kl": ("kl", {}),
    "mse": ("mse", {}),
    "mse centred": ("mse", {"center": "logprob", "reduction": "sum"}),
    "reverse-kl": ("reverse-kl", {}),
    "skewed-kl": ("skewed-kl", {}),
    "skewed-kl without skew": ("skewed-kl", {"skew": 0.0}),
    "skewed-reverse-kl": ("skewed-reverse-kl", {}),
    "top-k-kl": ("top-k-kl", {"k": 3}),
    "top-k-kl of all": ("top-k-kl", {"k": NUM_CLASSES}),
    "top-k-kl renormalised": ("top-k-kl", {"k": 3, "rest": "renormalise"}),
    "uld": ("uld", {}),
}


def logits(seed: int, *, rows: int = NUM_ROWS, classes: int = NUM_CLASSES, scale: float = 2.0) -> Tensor:
    """In double precision."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def call(variant: str, student: Tensor, teacher: Tensor, **more: Any) -> Tensor:
    """The loss of each row, with labels where they are needed."""
    name, options = VARIANTS[variant]
    method = LOSSES[name]
    if method.needs_labels:
        more = {"labels_N": LABELS[: len(student)]} | more
    return method.function(student, teacher, **(options | more))
