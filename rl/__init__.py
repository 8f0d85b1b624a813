"""Reinforcement learning of compressed policies: one small file for each method, one trainer for all."""

from .algorithm import Algorithm
from .algorithms import ALGORITHMS
from .batch import PolicyBatch, policy_batch
from .rollout import Prompt, Request, Rollout, RolloutGroup

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "PolicyBatch",
    "Prompt",
    "Request",
    "Rollout",
    "RolloutGroup",
    "policy_batch",
]
