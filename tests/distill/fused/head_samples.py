"""Small heads and their dense losses."""

from functools import partial

import torch
from moekit.distill import fused, losses

BY_ROWS = {
    "bild": partial(losses.bild, k=4),
    "binary-kl": partial(losses.binary_kl, center="mean"),
    "mse": partial(losses.logit_mse, center="logprob"),
    "top-k-kl": partial(losses.top_k_kl, k=3, temperature=2.0),
    "uld": losses.uld,
}
"""Losses without a derivative written by hand."""
OBJECTIVES = {
    "kl": (fused.kl(temperature=2.0), lambda s, t, y: losses.kl(s, t, temperature=2.0)),
    "kl-1": (fused.kl(), lambda s, t, y: losses.kl(s, t)),
    "reverse-kl": (
        fused.reverse_kl(temperature=0.5),
        lambda s, t, y: losses.reverse_kl(s, t, temperature=0.5),
    ),
    "skewed-kl": (fused.skewed_kl(skew=0.3), lambda s, t, y: losses.skewed_kl(s, t, skew=0.3)),
    "skewed-kl-0": (fused.skewed_kl(skew=0.0), lambda s, t, y: losses.skewed_kl(s, t, skew=0.0)),
    "skewed-reverse-kl": (
        fused.skewed_reverse_kl(temperature=3.0, skew=0.2),
        lambda s, t, y: losses.skewed_reverse_kl(s, t, temperature=3.0, skew=0.2),
    ),
    "jsd": (
        fused.jsd(temperature=2.0, beta=0.3),
        lambda s, t, y: losses.jsd(s, t, temperature=2.0, beta=0.3),
    ),
    "jsd-0": (fused.jsd(beta=0.0), lambda s, t, y: losses.jsd(s, t, beta=0.0)),
    "jsd-1": (fused.jsd(beta=1.0), lambda s, t, y: losses.jsd(s, t, beta=1.0)),
    "cross-entropy": (
        fused.cross_entropy(),
        lambda s, t, y: torch.nn.functional.cross_entropy(s, y, reduction="none"),
    ),
    "plain": (
        fused.cross_entropy_plus(fused.kl(temperature=2.0), 0.7, label_weight=0.3),
        lambda s, t, y: (
            0.3 * torch.nn.functional.cross_entropy(s, y, reduction="none")
            + 0.7 * losses.kl(s, t, temperature=2.0)
        ),
    ),
    "one-head": (
        fused.cross_entropy_plus(fused.binary_kl_norm(center="mean"), 0.1),
        lambda s, t, y: (
            torch.nn.functional.cross_entropy(s, y, reduction="none")
            + 0.1 * losses.binary_kl_norm(s, t, center="mean")
        ),
    ),
} | {
    f"binary-{center}-{reduction}": (
        fused.binary_kl_norm(temperature=1.5, center=center, reduction=reduction),
        lambda s, t, y, c=center, r=reduction: losses.binary_kl_norm(
            s, t, temperature=1.5, center=c, reduction=r
        ),
    )
    for center in ("none", "mean", "logprob")
    for reduction in ("sum", "mean")
}
OBJECTIVES |= {
    name: (fused.by_rows(loss), lambda s, t, y, loss=loss: loss(s, t)) for name, loss in BY_ROWS.items()
}
OBJECTIVES |= {
    "dkd": (
        fused.by_rows(partial(losses.dkd, temperature=2.0), needs_labels=True),
        lambda s, t, y: losses.dkd(s, t, labels_N=y, temperature=2.0),
    ),
    "one-head-uld": (
        fused.cross_entropy_plus(fused.by_rows(losses.uld, compares_columns=False), 0.5),
        lambda s, t, y: torch.nn.functional.cross_entropy(s, y, reduction="none") + 0.5 * losses.uld(s, t),
    ),
}
"""Fused objective and the dense loss of each row."""


class Sample:
    """Student, teacher and labels of N = 7 rows and C = 11 columns, two more of padding."""

    def __init__(self, dtype=torch.float64, *, softcap=None, scale=1.0, has_bias=True, num_rows=7):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.settings = {"softcap": softcap, "scale": scale, "num_columns": 11}
        self.hidden = random(num_rows, 5).requires_grad_()
        self.weight = random(13, 5).requires_grad_()
        self.bias = random(13).requires_grad_() if has_bias else None
        teacher_head = fused.Head(weight=random(11, 3), bias=random(11), softcap=softcap, scale=0.5)
        self.teacher = fused.TeacherStates(random(num_rows, 3), teacher_head)
        self.labels = torch.randint(11, (num_rows,), generator=generator)

    @property
    def head(self):
        return fused.Head(weight=self.weight, bias=self.bias, **self.settings)

    @property
    def leaves(self):
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def fused(self, objective, **options):
        if objective.needs_labels:
            options["labels"] = self.labels
        if objective.needs_teacher:
            options.setdefault("teacher", self.teacher)
        return fused.fused_loss(self.hidden, self.head, objective, **options)

    def dense(self, loss):
        return loss(dense_logits(self.hidden, self.head), self.teacher_logits(), self.labels).mean()

    def teacher_logits(self):
        return dense_logits(self.teacher.hidden, self.teacher.head)

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.leaves, retain_graph=True)


def dense_logits(hidden, head):
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    return losses.softcap(head.scale * logits[:, : head.width], head.softcap)
