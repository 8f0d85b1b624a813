"""The completions of a step: which prompts are taken, how often, and what is rehearsed beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from .batch import PolicyBatch, policy_batch
from .checkpoint import RunState
from .collect import Collector
from .prompts import draw_order
from .rehearsal import Rehearsal
from .rollout import Prompt, RolloutGroup
from .settings import PolicySettings

FIRST_REHEARSAL_GROUP = 2**24
"""Group numbers of rehearsal samples begin here."""


@dataclass(frozen=True, kw_only=True)
class StepRollouts:
    """This process's groups of a step.

    Attributes:
        numbers: Of the groups, among those of all processes.
        groups: In the order of the numbers.
        num_rounds: How often prompts were sampled.
    """

    numbers: list[int]
    groups: list[RolloutGroup]
    num_rounds: int = 1


@dataclass(kw_only=True)
class RolloutSampler:
    """Takes prompts from an endless stream and has them continued.

    Attributes:
        accelerator: Divides the prompts of a step.
        collector: Samples and rewards.
        prompts: Of the training.
        settings: How many of them, and how.
        pad_id: Fills up batches.
        rehearsal: Says which prompts are explored, and gives samples of the others.
    """

    accelerator: Accelerator
    collector: Collector
    prompts: Sequence[Prompt]
    settings: PolicySettings
    pad_id: int
    rehearsal: Rehearsal | None = None

    @property
    def _mine(self) -> slice:
        """This process's part of what is numbered over all."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def sample(self, state: RunState) -> StepRollouts:
        """The groups of a step; every process calls it.

        Methods that drop groups of equal rewards sample on, all processes together, until there are enough.

        Args:
            state: Before the step; the prompts that are taken are counted in it.
        """
        if not self.collector.algorithm.drops_uninformative:
            numbers, groups = zip(*self._round(state, 0), strict=True)
            return StepRollouts(numbers=list(numbers), groups=list(groups))
        wanted, found = self.settings.prompts_per_step, []
        for num_rounds in range(1, self.settings.max_sampling_rounds + 1):
            found += self._round(state, num_rounds - 1)
            own = sum(group.is_informative for _, group in found)
            if sum(gather_object([own])) >= wanted:
                break
        everything = gather_object(found) if self.accelerator.num_processes > 1 else found
        # Those that teach first, the others only to fill up; then in the order in which they were drawn.
        best = sorted(everything, key=lambda pair: (not pair[1].is_informative, pair[0]))[:wanted]
        ordered = sorted(best, key=lambda pair: pair[0])[self._mine]
        return StepRollouts(
            numbers=list(range(wanted))[self._mine],
            groups=[group for _, group in ordered],
            num_rounds=num_rounds,  # pyright: ignore[reportPossiblyUnboundVariable] - one round at least
        )

    def _round(self, state: RunState, number: int) -> list[tuple[int, RolloutGroup]]:
        """As many prompts as a step has, each with its number in the step."""
        wanted = self.settings.prompts_per_step
        pool = range(len(self.prompts)) if self.rehearsal is None else self.rehearsal.explored
        drawn = draw_order(len(pool), state.position, wanted, self.settings.seed)
        state.position += wanted
        numbered = [(number * wanted + i, self.prompts[pool[place]]) for i, place in enumerate(drawn)]
        mine = numbered[self._mine]
        groups = self.collector.collect(
            mine,
            self.settings.sampling,
            place=("rollout", state.step),
            step=state.step,
            version=state.updates,
        )
        return [(place, group) for (place, _), group in zip(mine, groups, strict=True)]

    def batch(self, rollouts: StepRollouts, state: RunState) -> PolicyBatch:
        """A step's groups as tensors, with rehearsal samples if there are any.

        Args:
            rollouts: What `sample` gave.
            state: The rehearsal samples that are taken are counted in it.
        """
        groups, numbers = list(rollouts.groups), list(rollouts.numbers)
        if self.rehearsal is not None and self.rehearsal.samples:
            count = self._num_rehearsed
            drawn = self.rehearsal.draw(state.rehearsed, count, self.settings.seed)[self._mine]
            state.rehearsed += count
            groups += [sample.group(self.prompts) for sample in drawn]
            numbers += list(range(FIRST_REHEARSAL_GROUP, FIRST_REHEARSAL_GROUP + count))[self._mine]
        return policy_batch(
            groups,
            pad_id=self.pad_id,
            masks_truncated=self.settings.mask_truncated_completions,
            group_ids=numbers,
        )

    @property
    def _num_rehearsed(self) -> int:
        """Samples of a step on all processes, equally many for each process and mini-batch."""
        settings = self.settings
        unit = self.accelerator.num_processes * settings.mini_batches
        return unit * max(1, round(settings.rehearsal_share * settings.completions_per_step / unit))
