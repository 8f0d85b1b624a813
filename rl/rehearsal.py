"""What the initial policy could do already, kept to be rehearsed (DPH-RL, arXiv 2509.07430 section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .batch import PolicyBatch, policy_batch
from .collect import Collector
from .generation.settings import SamplingSettings
from .prompts import draw_order
from .rollout import Prompt, Rollout, RolloutGroup

COUNTING_STEP, KEEPING_STEP = -2, -3
"""Steps of the seeds: of the samples that are counted, and of the one that is kept."""
CHUNK = 64
"""Prompts that are sampled at a time."""


@dataclass(frozen=True, kw_only=True)
class RehearsalSample:
    """A right completion of the initial policy.

    Attributes:
        prompt_index: Of the training's prompts.
        completion_ids: Its tokens.
        logprobs: ``[L]`` float32 under the initial policy, by the training engine.
    """

    prompt_index: int
    completion_ids: tuple[int, ...]
    logprobs: Tensor

    def group(self, prompts: Sequence[Prompt]) -> RolloutGroup:
        """As part of a step; it earns nothing."""
        rollout = Rollout(
            completion_ids=self.completion_ids,
            text="",
            is_truncated=False,
            source="rehearsal",
            ref_logprobs=self.logprobs,
        )
        return RolloutGroup(prompt=prompts[self.prompt_index], rollouts=(rollout,), rewards=torch.zeros(1))


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Prompts to explore, and samples of the others."""

    explored: tuple[int, ...]
    samples: tuple[RehearsalSample, ...]

    def draw(self, start: int, count: int, seed: int) -> list[RehearsalSample]:
        """Samples number ``start .. start + count`` of an endless stream that shuffles anew in each epoch."""
        return [self.samples[number] for number in draw_order(len(self.samples), start, count, seed)]


def build_rehearsal(
    collector: Collector,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    accelerator: Accelerator,
    logprobs_of: Callable[[PolicyBatch], Tensor],
    *,
    pass_at: float,
    threshold: float = 1.0,
) -> Rehearsal:
    """Sample every prompt with the initial policy and split the prompts by what it can do.

    A prompt is near-perfect if a share `threshold` of its completions is right; one more completion is drawn of
    it, and kept if it is right too. Every process calls this, and gets the same.

    Args:
        collector: With the number of completions to count (8 in the paper).
        prompts: Of the training.
        sampling: How.
        accelerator: Divides the prompts.
        logprobs_of: ``[B, L]`` of completions under the policy, by the training engine, on this process alone.
        pass_at: The first reward that a right completion reaches.
        threshold: Share of right ones (1 is the strict 8/8, 0.75 the paper's 6/8).

    Raises:
        ValueError: The policy solves every prompt (nothing to explore).
    """
    mine = list(enumerate(prompts))[accelerator.process_index :: accelerator.num_processes]
    one = replace(collector, num_generations=1)
    kept: list[RehearsalSample] = []
    for start in range(0, len(mine), CHUNK):
        counted = collector.collect(mine[start : start + CHUNK], sampling, step=COUNTING_STEP, version=0)
        solved = [
            (group.prompt.index, group.prompt)
            for group in counted
            if sum(is_right(group, pass_at)) >= threshold * len(group.rollouts)
        ]
        again = one.collect(solved, sampling, step=KEEPING_STEP, version=0) if solved else []
        kept += _samples([group for group in again if is_right(group, pass_at)[0]], logprobs_of)
    # Every process has its own part only.
    everything = gather_object(kept) if accelerator.num_processes > 1 else kept
    samples = tuple(sorted(everything, key=lambda sample: sample.prompt_index))
    rehearsed = {sample.prompt_index for sample in samples}
    explored = tuple(index for index in range(len(prompts)) if index not in rehearsed)
    if not explored:
        raise ValueError(
            f"the policy solves all {len(prompts)} prompts already: there is nothing left to explore; give "
            "harder ones, or raise rehearsal_threshold"
        )
    return Rehearsal(explored=explored, samples=samples)


def is_right(group: RolloutGroup, pass_at: float) -> list[bool]:
    """Which completions reach a value of the first reward function."""
    first = next(iter(group.rewards_by_function.values()), group.rewards)
    return [bool(value >= pass_at) for value in first.tolist()]


def _samples(
    groups: list[RolloutGroup], logprobs_of: Callable[[PolicyBatch], Tensor]
) -> list[RehearsalSample]:
    if not groups:
        return []
    logprobs_BL = logprobs_of(policy_batch(groups, pad_id=0)).float().cpu()
    found = []
    for group, row in zip(groups, logprobs_BL, strict=True):
        ids = group.rollouts[0].completion_ids
        found.append(
            RehearsalSample(
                prompt_index=group.prompt.index, completion_ids=ids, logprobs=row[: len(ids)].clone()
            )
        )
    return found


def write_rehearsal(path: Path, rehearsal: Rehearsal) -> None:
    """Save as safetensors, whole or not at all."""
    samples = rehearsal.samples
    tensors = {
        "explored": torch.tensor(rehearsal.explored, dtype=torch.long),
        "prompts": torch.tensor([s.prompt_index for s in samples], dtype=torch.long),
        "lengths": torch.tensor([len(s.completion_ids) for s in samples], dtype=torch.long),
        "ids": torch.tensor([i for s in samples for i in s.completion_ids], dtype=torch.long),
        "logprobs": torch.cat([torch.zeros(0), *(s.logprobs for s in samples)]),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def read_rehearsal(path: Path) -> Rehearsal | None:
    """What `write_rehearsal` wrote; ``None`` if there is no such file.

    Raises:
        ValueError: It is damaged.
    """
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        ids, logprobs = tensors["ids"].split(lengths), tensors["logprobs"].split(lengths)
        samples = tuple(
            RehearsalSample(prompt_index=index, completion_ids=tuple(i.tolist()), logprobs=lp)
            for index, i, lp in zip(tensors["prompts"].tolist(), ids, logprobs, strict=True)
        )
        return Rehearsal(explored=tuple(tensors["explored"].tolist()), samples=samples)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"'{path}' is damaged; remove it to sample the initial policy again") from error
