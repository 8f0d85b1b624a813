"""Distillation: dual-head students, their losses, and the alignment of the two gradients.

The losses are in `moekit.distill.losses`, those that never hold all logits in `moekit.distill.fused`.
"""

from .auxiliary_head import AuxiliaryHeadSpec, build_auxiliary_head
from .dual_head import DualHeadOutput, DualHeadStudent
from .gradient_alignment import GradientAlignment, alignment_factor, feature_products, parameter_products
from .task_head import TaskHead, UnsupportedStudentError, task_head

__all__ = [
    "AuxiliaryHeadSpec",
    "DualHeadOutput",
    "DualHeadStudent",
    "GradientAlignment",
    "TaskHead",
    "UnsupportedStudentError",
    "alignment_factor",
    "build_auxiliary_head",
    "feature_products",
    "parameter_products",
    "task_head",
]
