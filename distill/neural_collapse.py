"""How far features and classifier have collapsed to a simplex, and whether two losses pull one way.

At the end of a training with labels, features of a class gather at their mean, the means form a simplex
(equal lengths, equal angles), and the classifier's rows point along them. The dual-head paper argues that a
logit loss on the same head keeps the classifier from getting there.
"""

# N examples, C classes, D feature width

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NeuralCollapse:
    """Each is 0 where collapse is complete."""

    within_class: float
    """NC1, ``tr(S_W S_B^+) / C``: spread within classes, relative to that between them."""
    mean_lengths: float
    """NC2, coefficient of variation of the lengths of the centred class means."""
    mean_angles: float
    """NC2, mean of ``|cos(m_c, m_k) + 1 / (C - 1)|`` over pairs of class means."""
    classifier_lengths: float
    """As `mean_lengths`, of the classifier's rows, centred."""
    classifier_angles: float
    """As `mean_angles`, of the classifier's rows, centred."""
    duality: float
    """NC3, ``||W / ||W|| - M / ||M||||`` of the centred rows and means."""


@torch.no_grad()
def neural_collapse(
    features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, " N"], classifier_CD: Float[Tensor, "C D"]
) -> NeuralCollapse:
    """Measure collapse.

    Args:
        features_ND: What the classifier reads.
        labels_N: From 0 to C - 1; every class has to occur.
        classifier_CD: The task head's weight.

    Raises:
        ValueError: A class has no example, or a label no class.

    Reference: Papyan, Han, Donoho, Prevalence of neural collapse (PNAS 2020), arXiv:2008.08186.
    """
    features, weight = features_ND.double(), classifier_CD.double()
    num_classes = len(weight)
    counts_C = torch.bincount(labels_N, minlength=num_classes)
    if len(counts_C) != num_classes or not counts_C.all():
        raise ValueError(
            f"{num_classes} classes have {counts_C.tolist()} examples; each needs one at least, and no label "
            f"may be above {num_classes - 1}"
        )
    means_CD = torch.zeros_like(weight).index_add_(0, labels_N, features) / counts_C[:, None]
    centred_CD = means_CD - means_CD.mean(0)
    deviations_ND = features - means_CD[labels_N]
    within_DD = deviations_ND.T @ deviations_ND / len(features)
    between_DD = centred_CD.T @ centred_CD / num_classes
    # The pseudo-inverse of a matrix of rank C - 1: without the cut its rounding errors are inverted too.
    inverse_DD = torch.linalg.pinv(between_DD, rtol=1e-9, hermitian=True)
    rows_CD = weight - weight.mean(0)
    return NeuralCollapse(
        within_class=float((within_DD @ inverse_DD).trace() / num_classes),
        mean_lengths=_length_variation(centred_CD),
        mean_angles=_angle_error(centred_CD),
        classifier_lengths=_length_variation(rows_CD),
        classifier_angles=_angle_error(rows_CD),
        duality=float((rows_CD / rows_CD.norm() - centred_CD / centred_CD.norm()).norm()),
    )


def _length_variation(rows_CD: Tensor) -> float:
    lengths_C = rows_CD.norm(dim=1)
    return float(lengths_C.std(correction=0) / lengths_C.mean())


def _angle_error(rows_CD: Tensor) -> float:
    unit_CD = torch.nn.functional.normalize(rows_CD, dim=1)
    cosines_CC = unit_CD @ unit_CD.T
    off_diagonal = ~torch.eye(len(rows_CD), dtype=torch.bool, device=rows_CD.device)
    return float((cosines_CC[off_diagonal] + 1 / (len(rows_CD) - 1)).abs().mean())


def gradient_cosine(loss: Float[Tensor, ""], other: Float[Tensor, ""], parameters: Sequence[Tensor]) -> float:
    """Cosine of two losses' gradients over some parameters; below 0 they pull against each other.

    The graphs are kept. NaN where a loss reaches none of the parameters.
    """
    gradients = [
        torch.autograd.grad(part, parameters, retain_graph=True, materialize_grads=True)
        for part in (loss, other)
    ]
    first, second = (torch.cat([g.double().flatten() for g in found]) for found in gradients)
    return float(first.dot(second) / (first.norm() * second.norm()))
