"""Fewer experts: similarity, grouping, alignment, merging, and the plan that applies them."""

from .activation_matching import match_activations
from .alignment import Alignment, activation_permutation, align_expert, permute_expert
from .apply import apply_plan
from .fidelity import DomainFidelity, Estimate, FidelityReport, compare_models, confidence_interval
from .generation import Question, generate_completions, loop_share, split_questions, task_accuracy
from .grouping import (
    GroupCounts,
    adaptive_group_counts,
    assign_groups,
    dominant_experts,
    random_groups,
    uniform_group_counts,
)
from .layer_plan import ExpertGroup, LayerPlan
from .m_smoe import plan_m_smoe
from .merging import group_weights, merge_experts, merge_groups
from .methods import METHODS, Planner
from .plan import AlignmentRule, CompressionPlan, ModelIdentity
from .protection import super_experts
from .prune import plan_pruning
from .report import write_report
from .report_content import Comparison, DomainRow, LayerReport, ReportContent
from .scores import SCORES
from .similarity import SIMILARITIES, output_similarity, router_logit_similarity, weight_similarity
from .throughput import Throughput, compare_throughput

__all__ = [
    "METHODS",
    "SCORES",
    "SIMILARITIES",
    "Alignment",
    "AlignmentRule",
    "Comparison",
    "CompressionPlan",
    "DomainFidelity",
    "DomainRow",
    "Estimate",
    "ExpertGroup",
    "FidelityReport",
    "GroupCounts",
    "LayerPlan",
    "LayerReport",
    "ModelIdentity",
    "Planner",
    "Question",
    "ReportContent",
    "Throughput",
    "activation_permutation",
    "adaptive_group_counts",
    "align_expert",
    "apply_plan",
    "assign_groups",
    "compare_models",
    "compare_throughput",
    "confidence_interval",
    "dominant_experts",
    "generate_completions",
    "group_weights",
    "loop_share",
    "match_activations",
    "merge_experts",
    "merge_groups",
    "output_similarity",
    "permute_expert",
    "plan_m_smoe",
    "plan_pruning",
    "random_groups",
    "router_logit_similarity",
    "split_questions",
    "super_experts",
    "task_accuracy",
    "uniform_group_counts",
    "weight_similarity",
    "write_report",
]
