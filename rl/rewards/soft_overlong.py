"""A punishment for completions that come near the length limit."""

from collections.abc import Sequence
from typing import Any

from .reward_set import RewardFunction

CACHE_SHARE = 0.2
"""Of the limit; DAPO punishes the last 4096 of 20480 tokens."""


def soft_overlong(max_completion_length: int, cache_length: int | None = None) -> RewardFunction:
    """Make a reward between -1 and 0 that depends on the length alone.

    0 up to ``L_max - L_cache`` tokens, then ``(L_max - L_cache - length) / L_cache``, -1 at ``L_max``.

    Args:
        max_completion_length: L_max, tokens.
        cache_length: L_cache, tokens; a fifth of L_max by default.

    Raises:
        ValueError: L_cache is not in 1..L_max.

    Reference: Yu et al., DAPO, eq. 13, arXiv:2503.14476.
    """
    cache = max(1, round(CACHE_SHARE * max_completion_length)) if cache_length is None else cache_length
    if not 1 <= cache <= max_completion_length:
        raise ValueError(
            f"soft-overlong: cache_length={cache} is not in 1..{max_completion_length}, the completion length"
        )
    free = max_completion_length - cache

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [min(0.0, max(-1.0, (free - len(ids)) / cache)) for ids in completion_ids]

    return reward
