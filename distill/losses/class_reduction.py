"""From one value a class to one a row: sum or mean, and the weight that belongs to each."""

# N rows, V classes

from jaxtyping import Float
from torch import Tensor

from .checks import check_choice

REDUCTIONS = ("sum", "mean")
# Both published DHKD settings: alpha = 1 for 100 classes, alpha = 0.1 for 1,000.
WEIGHT_TIMES_CLASSES = 100.0


def reduce_classes(values_NV: Float[Tensor, "N V"], reduction: str) -> Float[Tensor, " N"]:
    """Sum or mean of each row.

    Raises:
        ValueError: ``reduction`` is neither.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    return values_NV.sum(-1) if reduction == "sum" else values_NV.mean(-1)


def published_weight(num_classes: int, reduction: str) -> float:
    """Give alpha, the weight of DHKD's loss beside the labels' cross-entropy, as published settings imply.

    A sum over classes grows with their number C, so alpha falls: ``alpha C = 100`` in both settings. With the
    mean instead it is 100 for any C.

    Raises:
        ValueError: There is no class, or ``reduction`` is neither sum nor mean.

    Reference: Yang et al., Dual-Head Knowledge Distillation, arXiv:2411.08937, the released training scripts.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} is not a number of classes; give 1 or more")
    return WEIGHT_TIMES_CLASSES / num_classes if reduction == "sum" else WEIGHT_TIMES_CLASSES
