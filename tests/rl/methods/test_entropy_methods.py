"""What the methods that look after the entropy must be in special cases."""

import pytest
import torch
from moekit.rl.algorithm import SelectionInputs, TokenStatistics
from moekit.rl.methods import clip_cov, epo, gtpo, kl_cov, reinforce

from .samples import case, context_of, gradient, on_policy, policy_logits, raw_batch, statistics, tiny_batch


def test_gtpo_without_conflict_has_plain_advantages():
    batch = raw_batch()
    ids = torch.arange(60).reshape(10, 6)
    found = gtpo.advantage(batch.with_(completion_ids=ids), context_of(), gamma=0.0, initial_entropy=9.0)
    expected = reinforce.advantage(batch, context_of())[:, None].expand(10, 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gtpo_drops_completions_of_high_entropy_only_if_it_began_below_the_threshold():
    batch = raw_batch().with_(old_entropies=torch.full((10, 6), 0.5, dtype=torch.float64))
    batch.old_entropies[0] = 0.8
    for start, is_kept in ((0.6, False), (0.7, True)):
        found = gtpo.advantage(batch, context_of(), initial_entropy=start)
        assert bool((found[0] != 0).any()) == is_kept
        assert (found[2] != 0).any()


def test_gtpo_punishes_entropy_where_all_rewards_are_equal():
    batch = raw_batch().with_(
        rewards=torch.full((10,), 0.1, dtype=torch.float64), is_rehearsal=torch.zeros(10, dtype=torch.bool)
    )
    found = gtpo.advantage(batch, context_of(), initial_entropy=9.0, gamma=0.1)
    assert (found < 0).all()
    assert (found[0] == found[0, 0]).all()


def test_gtpo_keeps_the_first_entropy():
    context = context_of(mean_entropy=0.4)
    gtpo.observe(context)
    context.mean_entropy = 0.9
    gtpo.observe(context)
    assert context.state == {"initial_entropy": 0.4}


def test_clip_cov_silences_selected_tokens_and_keeps_the_denominator():
    sample = case("clip-cov", share=0.1)
    chosen = sample.batch.selected
    assert chosen.sum() == sample.batch.policy_mask.sum() // 10
    logits = policy_logits().requires_grad_()
    now = statistics(logits, sample.batch.completion_ids)
    mask = sample.batch.policy_mask
    found = gradient(sample.token_loss("policy_loss", now).values, mask, logits)
    free = sample.batch.with_(selected=torch.zeros_like(mask))
    without = gradient(clip_cov.policy_loss(now, free, sample.context).values, mask, logits)
    assert (found[chosen] == 0).all()
    assert without[chosen].abs().sum() > 0
    assert torch.equal(found[~chosen], without[~chosen])


def test_clip_cov_draws_differently_with_other_seeds_and_only_candidates():
    torch.manual_seed(0)
    logprobs, advantages = torch.randn(400), torch.randn(400)
    found = []
    for seed in (0, 0, 1):
        tokens = SelectionInputs(
            logprobs=logprobs,
            old_logprobs=logprobs,
            advantages=advantages,
            generator=torch.Generator().manual_seed(seed),
        )
        found.append(clip_cov.selection(tokens, share=0.05, covariance_low=0.5, covariance_high=2.0))
    covariances = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    for chosen in found:
        assert chosen.sum() == 20
        assert ((covariances[chosen] > 0.5) & (covariances[chosen] < 2.0)).all()


def test_clip_cov_passes_over_tokens_that_the_ratio_clip_has_silenced():
    logprobs, advantages = torch.tensor([2.0, -2.0, 1.5, -1.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    tokens = SelectionInputs(
        logprobs=logprobs,
        old_logprobs=logprobs - torch.tensor([0.3, 0.3, 0.1, -0.3]),
        advantages=advantages,
        generator=torch.Generator(),
    )
    found = clip_cov.selection(tokens, share=1.0, covariance_low=0.1, epsilon=0.2)
    assert found.tolist() == [False, True, True, False]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_shares_that_make_no_sense_are_refused(share):
    for name in ("clip-cov", "kl-cov"):
        with pytest.raises(ValueError, match="share"):
            case(name, share=share)


def test_kl_cov_is_policy_gradient_in_the_first_update():
    sample, now, _ = on_policy("kl-cov", share=0.5)
    mask = sample.batch.policy_mask
    logprobs = now.logprobs.detach().requires_grad_()
    found = kl_cov.policy_loss(
        TokenStatistics(logprobs=logprobs, entropies=now.entropies.detach()), sample.batch, sample.context
    )
    expected = torch.where(mask, -sample.batch.advantages / mask.sum(), 0.0)
    torch.testing.assert_close(gradient(found.values, mask, logprobs), expected, rtol=0, atol=1e-15)


def test_epo_has_no_penalty_in_the_first_step():
    batch, context = raw_batch(), context_of(mean_entropy=0.1)
    epo.observe(context)
    now = statistics(policy_logits(), batch.completion_ids)
    found = epo.regularizer(now, batch, context, kappa_low=0.9, kappa_high=1.1)
    mask = batch.policy_mask
    assert torch.equal(found.values[mask], -1e-3 * now.entropies[mask])


def test_epo_range_is_that_of_all_steps_before_and_not_of_this_one():
    context = context_of()
    for entropy in (0.4, 0.6, 9.0):
        context.mean_entropy = entropy
        epo.observe(context)
    assert context.state["entropy_history"] == [0.4, 0.6]
    batch = tiny_batch(torch.zeros(1, 2, dtype=torch.long))
    entropies = torch.tensor([[0.99, 1.01]], dtype=torch.float64)
    found = epo.regularizer(TokenStatistics(logprobs=entropies, entropies=entropies), batch, context)
    assert found.metrics["entropy_in_range"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("penalty", ["hinge", "indicator"])
def test_epo_effective_weight_is_the_derivative_by_the_entropy(penalty):
    sample = case("epo", penalty=penalty, smooth_weight=0.9)
    now = statistics(policy_logits(), sample.batch.completion_ids)
    entropies = now.entropies.requires_grad_()
    found = sample.token_loss("regularizer", TokenStatistics(logprobs=now.logprobs, entropies=entropies))
    (slope,) = torch.autograd.grad(found.values.sum(), entropies)
    mask = sample.batch.policy_mask
    torch.testing.assert_close(found.metrics["effective_entropy_weight"][mask], -slope[mask])
    assert (slope[mask].unique().numel() > 1) == (penalty == "hinge")
