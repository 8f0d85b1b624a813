"""What the initial policy could do already, kept to be rehearsed (DPH-RL, arXiv 2509.07430 section 3)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .batch import PolicyBatch, policy_batch
from .collect import Collector
from .evaluation import is_right
from .prompts import draw_order
from .rollout import Prompt, Rollout, RolloutGroup
from .seeds import seed_of
from .settings import PolicySettings

COUNTING, KEEPING = ("rehearsal", "counted"), ("rehearsal", "kept")
"""Places of the seeds: of the samples that are counted, and of the one that is kept."""
CHUNK = 64
"""Prompts that are sampled at a time."""


@dataclass(frozen=True, kw_only=True)
class RehearsalSample:
    """A right completion of the initial policy.

    Attributes:
        prompt: Its place among the training's prompts.
        completion_ids: Its tokens.
        logprobs: ``[L]`` float32 under the initial policy, by the training engine.
    """

    prompt: int
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
        return RolloutGroup(prompt=prompts[self.prompt], rollouts=(rollout,), rewards=torch.zeros(1))


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Places of the prompts to explore, and samples of the others."""

    explored: tuple[int, ...]
    samples: tuple[RehearsalSample, ...]

    def draw(self, start: int, count: int, seed: int) -> list[RehearsalSample]:
        """Samples number ``start .. start + count`` of an endless stream that shuffles anew in each epoch."""
        order = draw_order(len(self.samples), start, count, seed_of(seed, "rehearsal"))
        return [self.samples[number] for number in order]


def build_rehearsal(
    collector: Collector,
    prompts: Sequence[Prompt],
    settings: PolicySettings,
    accelerator: Accelerator,
    logprobs_of: Callable[[PolicyBatch], Tensor],
) -> Rehearsal:
    """Sample every prompt with the initial policy and split the prompts by what it can do.

    A prompt is near-perfect if a share ``rehearsal_threshold`` of its completions is right (1 is the strict
    8/8, 0.75 the paper's 6/8); one more completion is drawn of it, and kept if it is right too. Every process
    calls this, and gets the same.

    Args:
        collector: Of the training.
        prompts: Of the training.
        settings: How many completions are counted, and what is right.
        accelerator: Divides the prompts.
        logprobs_of: ``[B, L]`` under the policy, by the training engine, on this process alone.

    Raises:
        ValueError: The policy solves every prompt (nothing to explore).
    """
    mine = list(enumerate(prompts))[accelerator.process_index :: accelerator.num_processes]
    kept: list[RehearsalSample] = []
    # Once for all chunks: processes have different numbers of them, and have to enter it together.
    with collector.whole_weights():
        alone = replace(collector, whole_weights=nullcontext, failures={}, told={})
        for start in range(0, len(mine), CHUNK):
            kept += _kept(alone, mine[start : start + CHUNK], settings, logprobs_of)
    # Every process has its own part only.
    everything = gather_object(kept) if accelerator.num_processes > 1 else kept
    samples = tuple(sorted(everything, key=lambda sample: sample.prompt))
    rehearsed = {sample.prompt for sample in samples}
    explored = tuple(place for place in range(len(prompts)) if place not in rehearsed)
    if not explored:
        raise ValueError(
            f"the policy solves all {len(prompts)} prompts already: there is nothing left to explore; give "
            "harder ones, or raise rehearsal_threshold"
        )
    return Rehearsal(explored=explored, samples=samples)


def _kept(
    collector: Collector,
    prompts: Sequence[tuple[int, Prompt]],
    settings: PolicySettings,
    logprobs_of: Callable[[PolicyBatch], Tensor],
) -> list[RehearsalSample]:
    """Right completions of those prompts that the policy solves."""
    count, pass_at = settings.rehearsal_generations, settings.pass_at
    many, one = replace(collector, num_generations=count), replace(collector, num_generations=1)
    counted = many.collect(prompts, settings.sampling, place=COUNTING, step=0, version=0)
    solved = [
        pair
        for pair, group in zip(prompts, counted, strict=True)
        if sum(is_right(group, pass_at)) >= settings.rehearsal_threshold * count
    ]
    again = one.collect(solved, settings.sampling, place=KEEPING, step=0, version=0)
    right = [
        (place, group) for (place, _), group in zip(solved, again, strict=True) if is_right(group, pass_at)[0]
    ]
    if not right:
        return []
    logprobs_BL = logprobs_of(policy_batch([group for _, group in right], pad_id=0)).float().cpu()
    found = []
    for (place, group), row in zip(right, logprobs_BL, strict=True):
        ids = group.rollouts[0].completion_ids
        found.append(RehearsalSample(prompt=place, completion_ids=ids, logprobs=row[: len(ids)].clone()))
    return found
