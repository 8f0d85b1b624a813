"""What happens to logits before any loss: the model's own softcap, padded columns, precision."""

# N rows, V vocabulary

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_same_classes


def softcap(logits: Float[Tensor, "*rows V"], cap: float | None) -> Float[Tensor, "*rows V"]:
    """``c tanh(z / c)``, the last step of models such as Gemma 2.

    Logits that a model returns went through it already; logits made from hidden states and the weights of a
    head have not, and a loss of those without it trains another model.

    Args:
        logits: In any precision, which stays.
        cap: c, ``final_logit_softcapping`` of the model's configuration; ``None`` changes nothing.

    Raises:
        ValueError: c is not a finite number above 0.

    Reference: Gemma 2, arXiv:2408.00118, section 2.
    """
    if cap is None:
        return logits
    if not 0 < cap < math.inf:
        raise ValueError(f"cap={cap} is not a finite number above 0; None leaves logits as they are")
    return (logits / cap).tanh() * cap


def drop_padded_columns(logits: Float[Tensor, "*rows V"], vocab_size: int) -> Float[Tensor, "*rows U"]:
    """Cut the columns that pad a vocabulary to a round number; a view.

    No token ever trained them. Filled up with zeros instead, the narrower side would give them probability,
    and a sum of logit differences would count them.

    Args:
        logits: Of either side.
        vocab_size: U, the number of tokens that the tokenizer knows.

    Raises:
        ValueError: ``vocab_size`` is not between 1 and V.
    """
    if not 1 <= vocab_size <= logits.shape[-1]:
        raise ValueError(
            f"vocab_size={vocab_size} is not between 1 and the {logits.shape[-1]} columns of the logits"
        )
    return logits[..., :vocab_size]


def comparable(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """Give both sides one precision, at least single, and make the teacher a constant.

    Raises:
        ValueError: The shapes differ.
    """
    check_same_classes(student_logits, teacher_logits)
    wide = common_dtype(student_logits, teacher_logits)
    return student_logits.to(wide), teacher_logits.detach().to(wide)


def common_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """The wider of the two precisions, at least single."""
    return torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
