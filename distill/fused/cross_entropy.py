"""Cross-entropy with labels in chunks, alone or with a teacher's loss on the same logits."""

# R rows, C columns

from torch import Tensor

from .objective import Objective, Tile, weighted_sum


def cross_entropy() -> Objective:
    """``-log S_y``, S the softmax and y the row's label; the derivative is S, less 1 at the label.

    Labels are those of packed rows: all of them count, from 0 to C - 1.
    """
    return Objective(rule=_rule, needs_teacher=False, needs_labels=True)


def cross_entropy_plus(objective: Objective, weight: float, *, label_weight: float = 1.0) -> Objective:
    """Mix labels and teacher on one head, as plain distillation does: ``g CE + w L`` of the same logits.

    Args:
        objective: L, such as ``kl(temperature=2.0)``.
        weight: w.
        label_weight: g.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """
    return weighted_sum((label_weight, cross_entropy()), (weight, objective))


def _rule(tile: Tile) -> tuple[Tensor, Tensor]:
    log_s_RC = tile.student.log_softmax(-1)
    labels_R1 = tile.labels[:, None]
    loss_R = log_s_RC.gather(1, labels_R1).squeeze(1).neg_()
    s_RC = log_s_RC.exp_()
    return loss_R, s_RC.scatter_add_(1, labels_R1, s_RC.new_full(labels_R1.shape, -1))
