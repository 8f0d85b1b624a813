"""The completions of a step as tensors: what advantages and losses read."""

# B completions, P prompt positions (left-padded), L completion positions (right-padded)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .rollout import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Completions of whole groups, or a part of them.

    Every tensor's first axis is B. What nobody computed is ``None``.

    Attributes:
        prompt_ids: Left-padded.
        prompt_mask: False for padding.
        completion_ids: Right-padded.
        token_mask: False for padding; forced tokens are tokens.
        loss_mask: Tokens that losses count: chosen by the policy (or forced and trained), and not of a
            truncated completion if those are left out.
        group_ids: Same number, same prompt.
        rewards: Weighted sum of the reward functions; NaN where none applied.
        rewards_by_function: By name.
        is_truncated: Met the length limit.
        is_external: Demonstrations (RL-PLUS).
        is_rehearsal: Stored completions of the initial policy (DPH-RL); they earn no advantage.
        budgets: Told tokens (HBPO); -1 where none.
        policy_versions: Optimizer steps behind the policy that wrote it.
        turn_indices: Of an episode.
        agents: Which policy.
        old_logprobs: ``[B, L]`` by the training engine before the updates of this step.
        old_entropies: ``[B, L]`` of that pass, nats.
        old_mean_vocab_logprobs: ``[B, L]`` mean over the vocabulary of log p (ROVER).
        ref_logprobs: ``[B, L]`` under the reference.
        sampling_logprobs: ``[B, L]`` as recorded while sampling.
        advantages: ``[B, L]``.
        selected: ``[B, L]`` tokens that a selection over the whole mini-batch has found.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B L"]
    token_mask: Bool[Tensor, "B L"]
    loss_mask: Bool[Tensor, "B L"]
    group_ids: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"]
    rewards_by_function: Mapping[str, Float[Tensor, " B"]] = field(default_factory=dict)
    is_truncated: Bool[Tensor, " B"]
    is_external: Bool[Tensor, " B"]
    is_rehearsal: Bool[Tensor, " B"]
    budgets: Int[Tensor, " B"]
    policy_versions: Int[Tensor, " B"]
    turn_indices: Int[Tensor, " B"]
    agents: Int[Tensor, " B"]
    old_logprobs: Float[Tensor, "B L"] | None = None
    old_entropies: Float[Tensor, "B L"] | None = None
    old_mean_vocab_logprobs: Float[Tensor, "B L"] | None = None
    ref_logprobs: Float[Tensor, "B L"] | None = None
    sampling_logprobs: Float[Tensor, "B L"] | None = None
    advantages: Float[Tensor, "B L"] | None = None
    selected: Bool[Tensor, "B L"] | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens of each completion, forced ones included."""
        return self.token_mask.sum(1)

    @property
    def external_mask(self) -> Bool[Tensor, "B L"]:
        """Tokens of demonstrations."""
        return self.token_mask & self.is_external[:, None]

    @property
    def policy_mask(self) -> Bool[Tensor, "B L"]:
        """Tokens that the policy loss counts: those of the loss mask, without rehearsal."""
        return self.loss_mask & ~self.is_rehearsal[:, None]

    @property
    def rehearsal_mask(self) -> Bool[Tensor, "B L"]:
        """Tokens of the loss mask that the initial policy wrote."""
        return self.loss_mask & self.is_rehearsal[:, None]

    def required(self, name: str) -> Tensor:
        """A tensor that a method needs.

        Raises:
            ValueError: Nobody computed it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the batch has no {name}; the algorithm's `needs` say what is computed for it")
        return value

    def with_(self, **changes: Any) -> "PolicyBatch":
        """A copy with other fields; tensors are shared."""
        return replace(self, **changes)

    def select(self, rows: Sequence[int] | Int[Tensor, " R"]) -> "PolicyBatch":
        """Some completions, in the given order, without the padding that they do not need."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.completion_ids.device)
        cut = {name: _picked(value, index) for name, value in self._tensors().items()}
        longest = max(1, int(cut["token_mask"].sum(1).max())) if len(index) else 1
        widest = max(1, int(cut["prompt_mask"].sum(1).max())) if len(index) else 1
        for name, value in cut.items():
            if name.startswith("prompt_"):
                cut[name] = value[:, -widest:]
            elif isinstance(value, Tensor) and value.ndim == 2:
                cut[name] = value[:, :longest]
        return replace(self, **cut)

    def to(self, device: torch.device | str) -> "PolicyBatch":
        """On another device."""
        return replace(self, **{name: _moved(value, device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def _picked(value: Any, index: Tensor) -> Any:
    return {k: v[index] for k, v in value.items()} if isinstance(value, Mapping) else value[index]


def _moved(value: Any, device: Any) -> Any:
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, Mapping) else value.to(device)


def policy_batch(
    groups: Sequence[RolloutGroup],
    *,
    pad_id: int,
    masks_truncated: bool = False,
    group_ids: Sequence[int] | None = None,
) -> PolicyBatch:
    """Lay groups out as tensors on the CPU.

    Args:
        groups: At least one.
        pad_id: Fills up; masked everywhere.
        masks_truncated: Leave completions that met the length limit out of every loss.
        group_ids: A number for each group; 0, 1, 2 .. by default.

    Raises:
        ValueError: There is no completion.
    """
    numbers = range(len(groups)) if group_ids is None else group_ids
    rows = [(n, group, r) for n, group in zip(numbers, groups, strict=True) for r in group.rollouts]
    if not rows:
        raise ValueError("a batch of no completions")
    rollouts = [rollout for _, _, rollout in rows]
    completion_ids, token_mask = _padded([r.completion_ids for r in rollouts], pad_id)
    prompt_ids, prompt_mask = _padded([g.prompt.ids for _, g, _ in rows], pad_id, left=True)
    loss_mask = _filled([r.loss_mask for r in rollouts], token_mask, False)
    is_truncated = torch.tensor([r.is_truncated for r in rollouts])
    if masks_truncated:
        loss_mask = loss_mask & ~is_truncated[:, None]
    names = dict.fromkeys(name for group in groups for name in group.rewards_by_function)
    has_sampled = any(r.sampling_logprobs is not None for r in rollouts)
    has_ref = any(r.ref_logprobs is not None for r in rollouts)
    return PolicyBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        token_mask=token_mask,
        loss_mask=loss_mask,
        group_ids=torch.tensor([number for number, _, _ in rows]),
        rewards=torch.cat([group.rewards.float() for group in groups]),
        rewards_by_function={name: torch.cat([_reward(group, name) for group in groups]) for name in names},
        is_truncated=is_truncated,
        is_external=torch.tensor([r.source == "demonstration" for r in rollouts]),
        is_rehearsal=torch.tensor([r.source == "rehearsal" for r in rollouts]),
        budgets=torch.tensor([-1 if r.budget is None else r.budget for r in rollouts]),
        policy_versions=torch.tensor([r.policy_version for r in rollouts]),
        turn_indices=torch.tensor([r.turn_index for r in rollouts]),
        agents=torch.tensor([r.agent for r in rollouts]),
        sampling_logprobs=_filled([r.sampling_logprobs for r in rollouts], token_mask, 0.0)
        if has_sampled
        else None,
        ref_logprobs=_filled([r.ref_logprobs for r in rollouts], token_mask, 0.0) if has_ref else None,
    )


def _reward(group: RolloutGroup, name: str) -> Tensor:
    """Of a function; NaN for a group that it never saw."""
    found = group.rewards_by_function.get(name)
    return torch.full((len(group.rollouts),), float("nan")) if found is None else found.float()


def _padded(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = True
    return ids, mask


def _filled(rows: Sequence[Tensor | None], token_mask: Tensor, empty: Any) -> Tensor:
    """Rows of different lengths as a matrix; what is not there is `empty`."""
    first = next(row for row in rows if row is not None)
    out = torch.full(token_mask.shape, empty, dtype=first.dtype)
    for number, row in enumerate(rows):
        if row is not None:
            out[number, : len(row)] = row
    return out
