"""Distillation: students with one or two heads, their teachers and losses, and the Trainer for them.

The losses are in `moekit.distill.losses`, those that never hold all logits in `moekit.distill.fused`.
"""

from .auxiliary_head import AuxiliaryHeadSpec, build_auxiliary_head
from .dual_head import DualHeadOutput, DualHeadStudent
from .gradient_alignment import GradientAlignment, alignment_factor, feature_products, parameter_products
from .recipe import DistillationRecipe
from .router_training import train_only_routers
from .student import StudentInTraining
from .task_head import TaskHead, UnsupportedStudentError, task_head
from .teachers import ModelTeacher, NonFiniteTeacherError, Teacher
from .trainer import DistillTrainer, NonFiniteLossError

__all__ = [
    "AuxiliaryHeadSpec",
    "DistillTrainer",
    "DistillationRecipe",
    "DualHeadOutput",
    "DualHeadStudent",
    "GradientAlignment",
    "ModelTeacher",
    "NonFiniteLossError",
    "NonFiniteTeacherError",
    "StudentInTraining",
    "TaskHead",
    "Teacher",
    "UnsupportedStudentError",
    "alignment_factor",
    "build_auxiliary_head",
    "feature_products",
    "parameter_products",
    "task_head",
    "train_only_routers",
]
