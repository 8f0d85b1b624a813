"""Sets of reward functions, and what they say of completions."""

from moekit.rl.rewards.reward_set import NamedReward, RewardSet


def reward_set(*functions, weights=None, **options) -> RewardSet:
    weights = weights or [1.0] * len(functions)
    named = [
        NamedReward(name=f.__name__, function=f, weight=w) for f, w in zip(functions, weights, strict=True)
    ]
    return RewardSet(named, **options)


def score(rewards, completions, *, step=0, prompts=None, **columns):
    size = len(completions)
    return rewards.score(
        prompts=prompts or ["p"] * size,
        completions=completions,
        completion_ids=[[1, 2]] * size,
        columns=columns,
        step=step,
    )
