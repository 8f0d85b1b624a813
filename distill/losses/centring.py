"""Freedom of the constant that softmax does not see: logits are centred before their values are compared."""

# N rows, V vocabulary

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from .checks import check_choice

CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logits_NV: logits_NV,
    "mean": lambda logits_NV: logits_NV - logits_NV.mean(-1, keepdim=True),
    "logprob": lambda logits_NV: logits_NV.log_softmax(-1),
}


def centred(logits_NV: Float[Tensor, "N V"], center: str) -> Float[Tensor, "N V"]:
    """Take a constant of each row off its logits.

    A loss of logits asks the student for the teacher's constant too, although no probability depends on it.
    Centring both sides takes that demand away: a constant added to a row of either changes nothing.

    - ``none``: the logits as they are, as in the DHKD paper.
    - ``mean``: ``z_k - mean_j z_j``. Every class has the same say in the constant.
    - ``logprob``: ``z_k - log sum_j exp z_j``, log-probabilities of temperature 1 whatever the loss's own is.
      The likely classes have the say, and a teacher known by its log-probabilities will do.

    Drop padded columns first: they would count.

    Raises:
        ValueError: ``center`` is none of these.

    Reference: on the shift that direct logit distillation does not allow for, CSD, arXiv:2509.25837.
    """
    check_choice("center", center, tuple(CENTRES))
    return CENTRES[center](logits_NV)
