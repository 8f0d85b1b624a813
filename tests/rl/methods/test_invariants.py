"""What every algorithm has in common."""

import pytest
import torch
from moekit.rl.algorithm import TokenStatistics
from moekit.rl.algorithms import ALGORITHMS

from .samples import case, policy_logits, raw_batch, statistics

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)

STOPS_GRADIENTS = {"reinforce", "rloo", "gtpo", "rl-plus"}
"""Their values do not have the gradient that autograd gives; `test_identities.py` looks at that."""


def gradient(sample, parts=None):
    policy = policy_logits().requires_grad_()
    loss = sample.loss(statistics(policy, sample.batch.completion_ids), parts)
    loss.backward()
    return loss.detach(), policy.grad


@every_algorithm
@pytest.mark.parametrize(
    "parts", [[[r] for r in range(10)], [[9, 0], [1, 8, 2, 3, 4], [7, 5, 6]]], ids=["one by one", "uneven"]
)
def test_loss_and_gradient_do_not_depend_on_micro_batches(name, parts):
    whole, cut = gradient(case(name)), gradient(case(name), parts)
    assert whole[1].abs().sum() > 0
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-14)


@every_algorithm
def test_order_of_completions_changes_nothing(name):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shuffled = raw_batch().with_(**{
        field: {} if isinstance(value, dict) else value[order]
        for field, value in vars(raw_batch()).items()
        if value is not None
    })  # fmt: skip
    policy = policy_logits()
    mixed = case(name, shuffled, statistics(policy[order], shuffled.completion_ids))
    loss = mixed.loss(statistics(policy[order], shuffled.completion_ids))
    torch.testing.assert_close(loss, gradient(case(name))[0], rtol=0, atol=1e-14)


@every_algorithm
def test_tokens_outside_the_masks_have_no_gradient_at_all(name):
    sample = case(name)
    mask = sample.batch.policy_mask
    if "rehearsal" in sample.algorithm.needs:
        mask = mask | sample.batch.rehearsal_mask
    _, found = gradient(sample)
    assert (found[~mask] == 0).all()
    assert not mask[2, 0]
    assert not mask[0, :6].logical_not().any()


@every_algorithm
def test_nothing_outside_the_masks_is_read(name):
    sample = case(name)
    mask = sample.batch.policy_mask | sample.batch.rehearsal_mask
    policy = policy_logits().requires_grad_()
    now = statistics(policy, sample.batch.completion_ids)
    tokens = {key: value for key, value in vars(now).items() if value is not None}
    wild = TokenStatistics(**{key: torch.where(mask, value, -torch.inf) for key, value in tokens.items()})
    batch = sample.batch.with_(
        old_logprobs=torch.where(mask, sample.batch.old_logprobs, torch.inf),
        old_mean_vocab_logprobs=torch.where(mask, sample.batch.old_mean_vocab_logprobs, torch.inf),
    )
    loss = type(sample)(algorithm=sample.algorithm, batch=batch, context=sample.context).loss(wild)
    loss.backward()
    expected = gradient(sample)
    torch.testing.assert_close((loss.detach(), policy.grad), expected, rtol=0, atol=1e-14)


@every_algorithm
def test_ratios_that_overflow_leave_loss_and_gradient_finite(name):
    sample = case(name)
    far = torch.where(torch.arange(6) % 2 == 0, 300.0, -300.0)
    batch = sample.batch.with_(
        old_logprobs=sample.batch.old_logprobs + far, ref_logprobs=sample.batch.ref_logprobs + far
    )
    loss, found = gradient(type(sample)(algorithm=sample.algorithm, batch=batch, context=sample.context))
    assert loss.isfinite()
    assert found.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - STOPS_GRADIENTS))
def test_gradient_is_that_of_the_loss(name):
    sample = case(name)
    now = statistics(policy_logits(), sample.batch.completion_ids)

    def loss(logprobs, entropies):
        stats = TokenStatistics(
            logprobs=logprobs, entropies=entropies, mean_vocab_logprobs=now.mean_vocab_logprobs
        )
        return sample.loss(stats)

    inputs = (now.logprobs.requires_grad_(), now.entropies.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@every_algorithm
def test_unknown_rewards_and_rehearsal_earn_no_advantage(name):
    advantages = case(name).batch.advantages
    assert (advantages[[6, 8, 9]] == 0).all()
    assert (advantages[0] != 0).any()


@every_algorithm
def test_rehearsal_takes_no_part_in_the_policy_loss(name):
    sample = case(name)
    policy = policy_logits().requires_grad_()
    now = statistics(policy, sample.batch.completion_ids)
    found = sample.token_loss("policy_loss", now)
    torch.where(sample.batch.policy_mask, found.values, 0.0).sum().backward()
    assert (policy.grad[8:] == 0).all()


@every_algorithm
def test_metrics_are_finite_matrices_without_gradient(name):
    sample = case(name)
    now = statistics(policy_logits().requires_grad_(), sample.batch.completion_ids)
    for function in ("policy_loss", "regularizer"):
        if sample.algorithm.bound(function) is not None:
            for value in sample.token_loss(function, now).metrics.values():
                assert value.shape == sample.batch.completion_ids.shape
                assert value.isfinite().all()
                assert not value.requires_grad
