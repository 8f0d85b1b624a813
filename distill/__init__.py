"""Distillation: students with one or two heads, their teachers and losses, and the Trainer for them.

The losses are in `moekit.distill.losses`, those that never hold all logits in `moekit.distill.fused`.
"""

from .auxiliary_head import AuxiliaryHeadSpec, build_auxiliary_head
from .cached_teacher import CachedTeacher
from .dual_head import DualHeadOutput, DualHeadStudent
from .gradient_alignment import GradientAlignment, alignment_factor, feature_products, parameter_products
from .recipe import DistillationRecipe
from .router_training import train_only_routers
from .student import StudentInTraining
from .task_head import TaskHead, UnsupportedStudentError, task_head
from .teacher_cache import CachedRows, CacheSpec, TeacherCache, build_cache
from .teachers import ModelTeacher, NonFiniteTeacherError, Teacher
from .token_alignment import align_text, same_tokenizer
from .trainer import DistillTrainer, NonFiniteLossError

__all__ = [
    "AuxiliaryHeadSpec",
    "CacheSpec",
    "CachedRows",
    "CachedTeacher",
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
    "TeacherCache",
    "UnsupportedStudentError",
    "align_text",
    "alignment_factor",
    "build_auxiliary_head",
    "build_cache",
    "feature_products",
    "parameter_products",
    "same_tokenizer",
    "task_head",
    "train_only_routers",
]
