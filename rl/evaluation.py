"""How good a policy is on held-out prompts, and whether it still finds different answers."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from .collect import Collector
from .generation.settings import SamplingSettings
from .pass_at_k import pass_at_k
from .rollout import Prompt, RolloutGroup

PLACE = ("evaluation",)
"""Of the seeds, the same in all evaluations, so that they differ by the policy alone."""
NAMES = ("right", "reward", "distinct", "distinct_correct", "length", "truncated")


def evaluate(
    collector: Collector,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    accelerator: Accelerator,
    *,
    pass_at: float,
    step: int,
) -> dict[str, float]:
    """Sample completions of every prompt, each process its share, and judge them.

    Args:
        collector: With the number of completions of each prompt.
        prompts: Held out.
        sampling: How.
        accelerator: Every process calls this.
        pass_at: The first reward that a right completion reaches.
        step: Rollout steps done, for reward functions.

    Returns:
        The same on every process: ``pass@k`` for k = 1, 2, 4 .. n, ``reward``, ``distinct`` (share of a
        prompt's completions that differ), ``distinct_correct`` (different right completions of a prompt),
        ``length`` and ``truncated``.
    """
    mine = list(enumerate(prompts))[accelerator.process_index :: accelerator.num_processes]
    groups = collector.collect(mine, sampling, place=PLACE, step=step, version=0)
    rows = [_counts(group, pass_at) for group in groups]
    n = collector.num_generations
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(NAMES)).to(accelerator.device)
    wide = accelerator.pad_across_processes(table, dim=0, pad_index=-1)
    everything = accelerator.gather(wide)
    assert isinstance(everything, torch.Tensor)
    found = everything[everything[:, 0] >= 0].cpu().numpy()
    right = found[:, 0].astype(int)
    result = dict(zip(NAMES[1:], found.mean(0)[1:].tolist(), strict=True))
    ks = [k for k in (2**i for i in range(n.bit_length())) if k <= n]
    return {f"pass@{k}": float(np.mean(pass_at_k(n, right, k))) for k in ks} | result


def is_right(group: RolloutGroup, pass_at: float) -> list[bool]:
    """Which completions reach a value of the first reward function; an unknown reward does not."""
    first = next(iter(group.rewards_by_function.values()), group.rewards)
    return [value >= pass_at for value in first.tolist()]


def _counts(group: RolloutGroup, pass_at: float) -> list[float]:
    """Of a prompt, in the order of ``NAMES``."""
    right = is_right(group, pass_at)
    texts = [rollout.text.strip() for rollout in group.rollouts]
    return [
        float(sum(right)),
        float(group.rewards.nan_to_num(0.0).mean()),
        len(set(texts)) / len(texts),
        float(len({text for text, ok in zip(texts, right, strict=True) if ok})),
        sum(len(r.completion_ids) for r in group.rollouts) / len(texts),
        sum(r.is_truncated for r in group.rollouts) / len(texts),
    ]
