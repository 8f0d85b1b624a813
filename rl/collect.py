"""Prompts in, groups of rewarded completions out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .algorithm import Algorithm
from .generation.generator import Generator, Sample, SampleRequest
from .generation.settings import SamplingSettings
from .rewards.reward_set import RewardSet
from .rollout import Prompt, Request, Rollout, RolloutGroup
from .seeds import seed_of


@dataclass(kw_only=True)
class Collector:
    """Samples completions and has them rewarded.

    Attributes:
        generator: Writes completions.
        rewards: Judges them.
        tokenizer: The policy's.
        algorithm: Whose shaper says what is asked for.
        num_generations: G.
        max_completion_length: Forced tokens included.
        seed: Of the run.
        whole_weights: A context in which the generator's model has all its weights; all processes enter it
            together.
        failures: Rewards that failed, by name and kind; whoever reads them empties it.
        told: Sum and count of what reward functions told to ``log_metric``, in the same way.
    """

    generator: Generator
    rewards: RewardSet
    tokenizer: Any
    algorithm: Algorithm
    num_generations: int
    max_completion_length: int
    seed: int
    whole_weights: Callable[[], AbstractContextManager[Any]] = nullcontext
    failures: dict[str, int] = field(default_factory=dict)
    told: dict[str, tuple[float, int]] = field(default_factory=dict)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that the method or the rewards cannot work on, before anything is sampled.

        Raises:
            ValueError: A column is missing, or what the method asks for does not fit group or length limit.
        """
        self.rewards.check_columns(_names(prompts))
        if self.algorithm.shaper is None:
            return
        title, longest = self.algorithm.title, self.max_completion_length
        for prompt in prompts:
            requests = self._shape(prompt)
            total = sum(r.num_samples + (r.demonstration_ids is not None) for r in requests)
            if total != self.num_generations:
                raise ValueError(
                    f"{title} makes {total} completions of prompt {prompt.index}, and num_generations="
                    f"{self.num_generations}; groups must be of one size"
                )
            if (forced := max(len(r.forced_ids) for r in requests)) >= longest:
                raise ValueError(
                    f"{title} begins completions with {forced} tokens, and max_completion_length={longest} "
                    "leaves none to the policy; raise it"
                )

    def collect(
        self,
        prompts: Sequence[tuple[int, Prompt]],
        sampling: SamplingSettings,
        *,
        place: tuple[int | str, ...],
        step: int,
        version: int,
    ) -> list[RolloutGroup]:
        """A group for each prompt; every process calls it, those without prompts too.

        Args:
            prompts: With its number at this place of the run, which the seed depends on.
            sampling: How completions are drawn.
            place: Of the run, which the seed depends on.
            step: Rollout steps done, for reward functions.
            version: Optimizer steps that the policy has behind it.
        """
        shaped = [(number, prompt, self._shape(prompt)) for number, prompt in prompts]
        wanted = [
            SampleRequest(
                prompt_ids=(*prompt.ids, *request.forced_ids),
                num_samples=request.num_samples,
                seed=seed_of(self.seed, *place, number, part),
            )
            for number, prompt, requests in shaped
            for part, request in enumerate(requests)
        ]
        forced = min((len(r.forced_ids) for _, _, requests in shaped for r in requests), default=0)
        sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens - forced)
        with self.whole_weights():
            drawn = iter(self.generator.generate(wanted, sampling) if wanted else [])
        rollouts = [
            [r for request in requests for r in self._rollouts(request, next(drawn), version)]
            for _, _, requests in shaped
        ]
        return self._rewarded([prompt for _, prompt, _ in shaped], rollouts, step) if shaped else []

    def _shape(self, prompt: Prompt) -> Sequence[Request]:
        shaper = self.algorithm.bound("shaper")
        if shaper is None:
            return [Request(num_samples=self.num_generations)]
        return shaper(prompt, self.num_generations, self.tokenizer, self.max_completion_length)

    def _rollouts(self, request: Request, samples: Sequence[Sample], version: int) -> list[Rollout]:
        found = [self._sampled(request, sample, version) for sample in samples]
        if request.demonstration_ids is not None:
            ids = request.demonstration_ids[: self.max_completion_length]
            found.append(
                Rollout(
                    completion_ids=ids,
                    text=self._text(ids),
                    is_truncated=len(ids) < len(request.demonstration_ids),
                    source="demonstration",
                    policy_version=version,
                )
            )
        return found

    def _sampled(self, request: Request, sample: Sample, version: int) -> Rollout:
        num_forced = len(request.forced_ids)
        ids = (*request.forced_ids, *sample.ids)[: self.max_completion_length]
        is_cut = len(ids) < num_forced + len(sample.ids)
        return Rollout(
            completion_ids=ids,
            text=self._text(ids),
            is_truncated=is_cut or not sample.is_finished,
            num_forced=num_forced,
            trains_forced=request.trains_forced,
            sampling_logprobs=torch.cat([torch.zeros(num_forced), sample.logprobs])[: len(ids)],
            budget=request.budget,
            policy_version=version,
        )

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _rewarded(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]], step: int
    ) -> list[RolloutGroup]:
        repeated = [prompt for prompt, group in zip(prompts, rollouts, strict=True) for _ in group]
        flat = [rollout for group in rollouts for rollout in group]
        scored = self.rewards.score(
            prompts=[p.given for p in repeated],
            completions=[
                [{"role": "assistant", "content": r.text}] if p.is_chat else r.text
                for p, r in zip(repeated, flat, strict=True)
            ],
            completion_ids=[list(r.completion_ids) for r in flat],
            columns=_columns(repeated),
            step=step,
        )
        for name, count in scored.failures.items():
            self.failures[name] = self.failures.get(name, 0) + count
        for name, value in scored.metrics.items():
            total, count = self.told.get(name, (0.0, 0))
            self.told[name] = total + value * len(flat), count + len(flat)
        groups, start = [], 0
        for prompt, group in zip(prompts, rollouts, strict=True):
            part = slice(start, start + len(group))
            groups.append(
                RolloutGroup(
                    prompt=prompt,
                    rollouts=tuple(group),
                    rewards=scored.rewards[part],
                    rewards_by_function={name: v[part] for name, v in scored.by_function.items()},
                )
            )
            start += len(group)
        return groups


def _names(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Each column of the data, a value for each completion; ``None`` where a row lacks it."""
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in _names(prompts)}
