"""ULD: distributions over different vocabularies, compared by their shape alone."""

# N rows, V student vocabulary, U teacher vocabulary

from jaxtyping import Float
from torch import Tensor

from .checks import check_same_rows, check_temperature
from .logits import common_dtype
from .probabilities import tempered_log_softmax


def uld(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N U"], *, temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """``sum_k |S_(k) - T_(k)|`` of each row: sorted probabilities, the shorter list filled up with zeros.

    How sure the teacher is, not what of. Rows must belong to each other: where two tokenizers cut a text
    differently, align the positions first.

    Temperature: T and S are the softmax of ``z / tau``. There is no factor tau^2, because the L1 distance is
    no KL and its gradient falls as 1/tau alone.

    Args:
        student_logits: Before any softmax.
        teacher_logits: A constant.
        temperature: tau.

    Returns:
        Between 0 and 2.

    Raises:
        ValueError: Different numbers of rows, or tau is not a finite number above 0.

    Reference: Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
    LLMs, arXiv:2402.12030.
    """
    check_temperature(temperature)
    check_same_rows(student_logits, teacher_logits)
    wide = common_dtype(student_logits, teacher_logits)
    log_student_NV = tempered_log_softmax(student_logits, temperature, wide)
    log_teacher_NU = tempered_log_softmax(teacher_logits.detach(), temperature, wide)
    student_NV = log_student_NV.exp().sort(-1, descending=True).values
    teacher_NU = log_teacher_NU.exp().sort(-1, descending=True).values
    shared = min(student_NV.shape[1], teacher_NU.shape[1])
    # Against zeros, which need not be made: probabilities are their own absolute values.
    alone_N = student_NV[:, shared:].sum(-1) + teacher_NU[:, shared:].sum(-1)
    return (student_NV[:, :shared] - teacher_NU[:, :shared]).abs().sum(-1) + alone_N
