"""What every loss refuses, before the work."""

import math

from torch import Tensor


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0, with a ``ValueError``."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not a finite number above 0")


def check_weight(name: str, value: float) -> None:
    """Refuse a weight that is not a finite number of at least 0, with a ``ValueError``."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} is not a finite number of at least 0")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not one of those allowed, with a ``ValueError``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def check_top_k(k: int, num_classes: int, *, smallest: int) -> None:
    """Refuse a number of chosen classes outside ``smallest`` to V, with a ``ValueError``."""
    if not smallest <= k <= num_classes:
        raise ValueError(f"k={k} is not between {smallest} and the {num_classes} classes of the logits")


def check_same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits of two shapes, with a ``ValueError`` that says what to use instead."""
    student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
    check_same_rows(student_logits, teacher_logits)
    if student != teacher:
        raise ValueError(
            f"student logits have shape {student} and teacher logits {teacher}: their vocabularies differ. "
            "If one only has padding at its end, cut both with drop_padded_columns; if the tokenizers "
            "differ, use uld"
        )


def check_same_rows(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits that are no matrices or of two numbers of rows, with a ``ValueError``."""
    student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if len(student) != 2 or len(teacher) != 2:
        raise ValueError(
            f"student logits have shape {student} and teacher logits {teacher}; a loss takes rows by "
            "classes, so pack [batch, sequence, vocabulary] with valid_rows"
        )
    if student[0] != teacher[0]:
        raise ValueError(
            f"student logits have shape {student} and teacher logits {teacher}: the numbers of rows differ. "
            "Pack both with the same valid_rows"
        )
