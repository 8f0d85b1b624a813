"""BinaryKL: each class is a coin, and the student's coins should fall as the teacher's do."""

# N rows, V vocabulary

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from .centring import centred
from .checks import check_temperature
from .class_reduction import reduce_classes
from .logits import comparable

# exp(-40) is below the last digit of double precision beside 40, and exp(40) fits single precision.
LINEAR_FROM = 40


def binary_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    *,
    temperature: float = 2.0,
    center: str = "none",
    reduction: str = "sum",
) -> Float[Tensor, " N"]:
    """``tau^2 sum_k KL(Bern(sigmoid(t_k / tau)) || Bern(sigmoid(s_k / tau)))`` of each row.

    Computed as ``softplus(s) - softplus(t) - sigmoid(t) (s - t)`` of the tempered logits, which is 0 at s = t
    to the last bit and never overflows. Its gradient is ``tau (sigmoid(s_k / tau) - sigmoid(t_k / tau))``,
    which vanishes where both sigmoids saturate: one tau cannot serve teachers of large and of small logits.
    `binary_kl_norm` has no such regions.

    Temperature: with the factor tau^2, so that gradients do not fall as 1/tau^2.

    Args:
        student_logits: Before any softmax.
        teacher_logits: A constant.
        temperature: tau.
        center: See `centred`.
        reduction: Over classes; ``sum`` is the paper's. The weight that fits either: `published_weight`.

    Raises:
        ValueError: Shapes that differ, or an argument out of its range.

    Reference: Yang et al., Dual-Head Knowledge Distillation (KDD 2025), arXiv:2411.08937; from multi-label
    distillation, L2D, where tau is 1.

    *Departs from the paper*: the release clamps probabilities, which gives infinite losses on one side of
    saturation and no gradient on the other.
    """
    check_temperature(temperature)
    student_NV, teacher_NV = comparable(student_logits, teacher_logits)
    student_NV = centred(student_NV, center) / temperature
    teacher_NV = centred(teacher_NV, center) / temperature
    student_part_NV = softplus(student_NV, threshold=LINEAR_FROM) - softplus(
        teacher_NV, threshold=LINEAR_FROM
    )
    values_NV = student_part_NV - teacher_NV.sigmoid() * (student_NV - teacher_NV)
    return temperature**2 * reduce_classes(values_NV, reduction)
