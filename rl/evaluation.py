"""How good a policy is on held-out prompts, and whether it still finds different answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from .collect import Collector
from .generation.settings import SamplingSettings
from .pass_at_k import pass_at_k
from .rollout import Prompt, RolloutGroup

ONE_STEP = -1
"""The step whose seeds all evaluations share, so that they differ by the policy alone."""


def evaluate(
    collector: Collector,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    accelerator: Accelerator,
    *,
    pass_at: float,
) -> dict[str, float]:
    """Sample completions of every prompt, each process its share, and judge them.

    Args:
        collector: With the number of completions of each prompt.
        prompts: Held out.
        sampling: How.
        accelerator: Every process calls this.
        pass_at: The first reward that a right completion reaches.

    Returns:
        ``pass@k`` for k = 1, 2, 4 .. n (the same on every process), ``reward``, ``distinct`` (share of a prompt's
        completions that differ), ``distinct_correct`` (different right completions of a prompt), ``length`` and
        ``truncated``.
    """
    mine = list(enumerate(prompts))[accelerator.process_index :: accelerator.num_processes]
    groups = collector.collect(mine, sampling, step=ONE_STEP, version=0) if mine else []
    rows = [_counts(group, pass_at) for group in groups]
    n = collector.num_generations
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6).to(accelerator.device)
    wide = accelerator.pad_across_processes(table, dim=0, pad_index=-1)
    everything = accelerator.gather(wide)
    assert isinstance(everything, torch.Tensor)
    found = everything[everything[:, 0] >= 0].cpu().numpy()
    right = found[:, 0].astype(int)
    means = found.mean(0)
    names = ("correct", "reward", "distinct", "distinct_correct", "length", "truncated")
    result = dict(zip(names[1:], map(float, means[1:]), strict=True))
    ks = [k for k in (2**i for i in range(n.bit_length())) if k <= n]
    return {f"pass@{k}": float(np.mean(pass_at_k(n, right, k))) for k in ks} | result


def _counts(group: RolloutGroup, pass_at: float) -> list[float]:
    """Right ones, mean reward, share of different ones, different right ones, mean length, share truncated."""
    first: Any = next(iter(group.rewards_by_function.values()), group.rewards)
    is_right = [bool(value >= pass_at) for value in first.tolist()]
    texts = [rollout.text.strip() for rollout in group.rollouts]
    right = {text for text, ok in zip(texts, is_right, strict=True) if ok}
    return [
        float(sum(is_right)),
        float(group.rewards.nan_to_num(0.0).mean()),
        len(set(texts)) / len(texts),
        float(len(right)),
        sum(len(r.completion_ids) for r in group.rollouts) / len(texts),
        sum(r.is_truncated for r in group.rollouts) / len(texts),
    ]
