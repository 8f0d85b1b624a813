"""What a policy wrote: completions, and the groups of them that share a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Source = Literal["policy", "demonstration", "rehearsal"]
"""Who wrote a completion: the policy in training, somebody else, or the policy before the training."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row of the data, ready to be continued.

    Attributes:
        index: Its number in the data.
        text: As the policy reads it, after the chat template.
        ids: Its tokens, without padding.
        given: The row's ``prompt`` as it stands in the data: a string, or a list of messages.
        columns: The row's other columns, for rewards and methods.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    given: Any
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the data give messages."""
        return not isinstance(self.given, str)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Completions that are wanted of one prompt; what a rollout shaper makes.

    Attributes:
        num_samples: How many the policy writes.
        forced_ids: How each begins; they belong to the completion, but nobody chose them.
        trains_forced: Whether the loss counts them all the same (HBPO).
        budget: Tokens that they were told to use (HBPO).
        demonstration_ids: One completion that is added, not written by the policy (RL-PLUS).
    """

    num_samples: int
    forced_ids: tuple[int, ...] = ()
    trains_forced: bool = False
    budget: int | None = None
    demonstration_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion.

    Attributes:
        completion_ids: Its tokens, the end token included if it was written.
        text: Decoded, without special tokens.
        is_truncated: It met the length limit before it ended.
        num_forced: Tokens at its beginning that nobody chose.
        trains_forced: See `Request`.
        sampling_logprobs: ``[L]`` float32 under the distribution that was sampled from, 0 for forced tokens;
            ``None`` where nobody sampled here.
        source: See `Source`.
        budget: See `Request`.
        policy_version: Optimizer steps that the policy had behind it.
        turn_index: Of an episode of several turns.
        agent: Which of several policies.
        ref_logprobs: ``[L]`` under the policy before the training, for rehearsal only.
    """

    completion_ids: tuple[int, ...]
    text: str
    is_truncated: bool
    num_forced: int = 0
    trains_forced: bool = False
    sampling_logprobs: Tensor | None = None
    source: Source = "policy"
    budget: int | None = None
    policy_version: int = 0
    turn_index: int = 0
    agent: int = 0
    ref_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.completion_ids:
            raise ValueError("a completion has no token; an end token at least is needed")

    @property
    def loss_mask(self) -> Tensor:
        """``[L]`` bool: the tokens that a loss may count."""
        mask = torch.ones(len(self.completion_ids), dtype=torch.bool)
        if not self.trains_forced:
            mask[: self.num_forced] = False
        return mask


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """All completions of one prompt, with what they earned.

    Attributes:
        prompt: What was continued.
        rollouts: The completions.
        rewards: ``[G]`` float32; NaN where no reward applied.
        rewards_by_function: ``[G]`` each; NaN where a function did not apply or failed.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: Tensor
    rewards_by_function: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.rollouts):
            raise ValueError(f"{len(self.rollouts)} completions have {len(self.rewards)} rewards")

    @property
    def is_informative(self) -> bool:
        """Whether the rewards differ, so that a group-relative method learns from them."""
        known = self.rewards[~self.rewards.isnan()]
        return len(known) > 1 and bool(known.max() > known.min())
