"""Metrics of a step against loops over completions and tokens."""

import statistics

import pytest
import torch
from accelerate import Accelerator
from moekit.rl.algorithm import TokenStatistics
from moekit.rl.batch import policy_batch
from moekit.rl.rollout import Prompt, Rollout, RolloutGroup
from moekit.rl.step_metrics import add_rollout_metrics, add_update_metrics, finish_covariance
from moekit.rl.sums import Sums

NAN = float("nan")


def make_group(index, completions, rewards, *, truncated=(), sources=None):
    sources = sources or ["policy"] * len(completions)
    return RolloutGroup(
        prompt=Prompt(index=index, text="p", ids=(1, 2), given="p"),
        rollouts=tuple(
            Rollout(completion_ids=ids, text="", is_truncated=number in truncated, source=source)
            for number, (ids, source) in enumerate(zip(completions, sources, strict=True))
        ),
        rewards=torch.tensor(rewards),
        rewards_by_function={"first": torch.tensor(rewards) * 2},
    )


@pytest.fixture
def batch():
    return policy_batch(
        [
            make_group(0, [(5, 6), (5, 6), (7,)], [1.0, 0.0, 0.5], truncated=(2,)),
            make_group(1, [(8, 9, 10), (8, 9), (8, 9, 0)], [1.0, 1.0, NAN]),
            make_group(2, [(3, 3), (4,)], [0.0, 9.0], sources=["policy", "demonstration"]),
        ],
        pad_id=0,
    )


def test_rollout_metrics(batch):
    sums = Sums()
    add_rollout_metrics(sums, batch)
    means = sums.means(Accelerator(cpu=True))
    known = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    assert means["reward"] == pytest.approx(statistics.mean(known))
    assert means["rewards/first/mean"] == pytest.approx(2 * statistics.mean(known))
    assert means["reward_std"] == pytest.approx((statistics.stdev([1.0, 0.0, 0.5]) + 0) / 2)
    assert means["frac_reward_zero_std"] == pytest.approx(1 / 2), "of the two groups that can be compared"
    assert means["completions/mean_length"] == pytest.approx((2 + 2 + 1 + 3 + 2 + 3 + 2) / 7)
    assert means["completions/mean_terminated_length"] == pytest.approx((2 + 2 + 3 + 2 + 3 + 2) / 6)
    assert means["completions/clipped_ratio"] == pytest.approx(1 / 7)
    # Padding is no difference, and a token that equals it is one: (8, 9) is not (8, 9, 0).
    assert means["completions/distinct"] == pytest.approx((2 + 3 + 1) / 7)


def test_update_metrics_are_means_over_counted_tokens(batch):
    generator = torch.Generator().manual_seed(0)
    shape = batch.completion_ids.shape
    draw = lambda: -torch.rand(shape, generator=generator)  # noqa: E731
    logprobs, old, ref, advantages = draw(), draw(), draw(), draw()
    now = TokenStatistics(logprobs=logprobs, entropies=draw().abs())
    batch = batch.with_(old_logprobs=old, ref_logprobs=ref, advantages=advantages)
    mask = batch.loss_mask
    own = [
        (b, t) for b in range(shape[0]) for t in range(shape[1]) if mask[b, t] and not batch.is_external[b]
    ]
    split = Sums()
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7]):
        part = batch.select(rows)
        width = part.completion_ids.shape[1]
        here = TokenStatistics(logprobs=logprobs[rows, :width], entropies=now.entropies[rows, :width])
        add_update_metrics(split, here, part, part.loss_mask, {"mine": old[rows, :width]}, has_reference=True)
    means = finish_covariance(split.means(Accelerator(cpu=True)))

    def mean(values):
        return statistics.mean(float(values[place]) for place in own)

    assert means["entropy"] == pytest.approx(mean(now.entropies))
    difference = ref - logprobs
    assert means["kl"] == pytest.approx(mean(difference.exp() - difference - 1))
    x, y = logprobs - mean(logprobs), advantages - mean(advantages)
    assert means["entropy_covariance"] == pytest.approx(mean(x * y), abs=1e-7)
    assert means["mine"] == pytest.approx(float(old[mask].mean())), (
        "the method's own tell of demonstrations too"
    )
    assert not [name for name in means if name.startswith("covariance/")]
