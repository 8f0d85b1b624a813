"""What completions earn: reward functions in TRL's form, by name or of the user."""

from .names import REWARDS, load_reward
from .reward_set import NamedReward, RewardFunction, RewardSet, Scored, TrainerState

__all__ = [
    "REWARDS",
    "NamedReward",
    "RewardFunction",
    "RewardSet",
    "Scored",
    "TrainerState",
    "load_reward",
]
