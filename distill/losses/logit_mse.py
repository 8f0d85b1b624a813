"""The mean squared difference of logits."""

# N rows, V vocabulary

from jaxtyping import Float
from torch import Tensor

from .centring import centred
from .checks import check_temperature
from .class_reduction import reduce_classes
from .logits import comparable


def logit_mse(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 1.0,
    center: str = "none",
    reduction: str = "mean",
) -> Float[Tensor, " N"]:
    """``mean_k (s_k - t_k)^2`` of each row.

    Centred by its mean, half of it is what Hinton's tau^2 KL tends to as tau grows.

    Temperature: without effect. ``tau^2 ((s - t) / tau)^2`` has no tau left; it is an argument, and checked,
    so that all losses are called alike.

    Args:
        student_logits: Before any softmax.
        teacher_logits: A constant.
        temperature: tau.
        center: See `centred`.
        reduction: Over classes: ``mean``, or ``sum`` as in the paper.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: Kim et al., Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
    Distillation (IJCAI 2021), arXiv:2105.08919.

    *Departs from the paper*: the mean over classes is the default, so that a weight means the same for any V.
    """
    check_temperature(temperature)
    student_NV, teacher_NV = comparable(student_logits, teacher_logits)
    difference_NV = centred(student_NV, center) - centred(teacher_NV, center)
    return reduce_classes(difference_NV.square(), reduction)
