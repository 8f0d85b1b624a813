"""Reinforcement learning of compressed policies: one small file for each method, one trainer for all."""

from .algorithm import Algorithm, MethodContext, SelectionInputs, TokenLoss, TokenStatistics
from .algorithms import ALGORITHMS
from .batch import PolicyBatch, policy_batch
from .checkpoint import RunState
from .finite import NonFiniteError
from .generation.embedded import EmbeddedGenerator
from .generation.generator import Generator, Sample, SampleRequest
from .generation.settings import SamplingSettings
from .history import History
from .policy import Policy
from .prompts import make_prompts
from .rehearsal import Rehearsal, RehearsalSample
from .rewards.reward_set import NamedReward, RewardSet
from .rollout import Prompt, Request, Rollout, RolloutGroup
from .settings import PolicySettings
from .trainer import PolicyTrainer

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "EmbeddedGenerator",
    "Generator",
    "History",
    "MethodContext",
    "NamedReward",
    "NonFiniteError",
    "Policy",
    "PolicyBatch",
    "PolicySettings",
    "PolicyTrainer",
    "Prompt",
    "Rehearsal",
    "RehearsalSample",
    "Request",
    "RewardSet",
    "Rollout",
    "RolloutGroup",
    "RunState",
    "Sample",
    "SampleRequest",
    "SamplingSettings",
    "SelectionInputs",
    "TokenLoss",
    "TokenStatistics",
    "make_prompts",
    "policy_batch",
]
