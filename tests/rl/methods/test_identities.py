"""What each method must be in special cases."""

import math

import pytest
import torch
from moekit.rl.algorithm import TokenStatistics
from moekit.rl.algorithms import ALGORITHMS
from moekit.rl.methods import dph_rl, grpo, hbpo, reinforce, rl_plus, rover
from moekit.rl.reduction import reduce_loss

from .samples import case, context_of, gradient, on_policy, policy_logits, raw_batch, statistics, tiny_batch

ON_POLICY = sorted(set(ALGORITHMS) - {"rover", "rl-plus", "clip-cov"})


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "dr-grpo", "reinforce", "rloo", "rl-plus"])
def test_advantages_of_a_group_add_up_to_zero(name):
    batch = case(name).batch
    for group in (4, 2):
        assert abs(float(batch.advantages[batch.group_ids == group, 0].sum())) < 1e-12


@pytest.mark.parametrize("name", ON_POLICY)
def test_first_update_has_the_gradient_of_reinforce(name):
    sample, now, logits = on_policy(name)
    found = gradient(sample.token_loss("policy_loss", now).values, sample.batch.policy_mask, logits)
    plain = reinforce.policy_loss(now, sample.batch, sample.context)
    if name == "gspo":  # the same up to the sequence means that belong to it
        found = gradient(
            sample.token_loss("policy_loss", now).values, sample.batch.policy_mask, logits, "sequence-mean"
        )
        expected = gradient(plain.values, sample.batch.policy_mask, logits, "sequence-mean")
    else:
        expected = gradient(plain.values, sample.batch.policy_mask, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert expected.abs().max() > 1e-3


def test_reinforce_has_the_gradient_of_the_log_probability():
    sample, now, logits = on_policy("reinforce")
    mask = sample.batch.policy_mask
    expected = gradient(-sample.batch.advantages * now.logprobs, mask, logits)
    found = gradient(sample.token_loss("policy_loss", now).values, mask, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_dapo_with_equal_clips_is_grpo_under_one_reduction():
    dapo, now = case("dapo"), statistics(policy_logits(), raw_batch().completion_ids)
    same = case("grpo").token_loss("policy_loss", now).values
    other = dapo.token_loss("policy_loss", now).values
    equal = case("dapo", epsilon_high=0.2).token_loss("policy_loss", now).values
    assert torch.equal(equal, same)
    assert not torch.equal(other, same)


def test_clip_flags_are_where_the_gradient_stops():
    sample = case("grpo")
    now = statistics(policy_logits(), sample.batch.completion_ids)
    logprobs = now.logprobs.detach().requires_grad_()
    found = sample.token_loss("policy_loss", TokenStatistics(logprobs=logprobs, entropies=now.entropies))
    found.values.sum().backward()
    flags = (found.metrics["clip_ratio/low"] + found.metrics["clip_ratio/high"]).bool()
    learns = sample.batch.policy_mask & (sample.batch.advantages != 0)
    assert (flags & learns).any()
    assert torch.equal((logprobs.grad != 0), learns & ~flags)


def test_gspo_clips_completions_as_a_whole():
    sample = case("gspo")
    logprobs = sample.batch.old_logprobs.clone()
    logprobs[0, 0] += 0.6  # mean 0.1, above 4e-4; other tokens have not changed
    found = sample.token_loss("policy_loss", TokenStatistics(logprobs=logprobs, entropies=logprobs))
    assert (sample.batch.advantages[0] > 0).all()
    torch.testing.assert_close(found.values[0], -1.0004 * sample.batch.advantages[0])


def test_rloo_baseline_leaves_out_the_completion_itself():
    batch = tiny_batch(
        torch.zeros(3, 1, dtype=torch.long), rewards=torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)
    )
    found = ALGORITHMS["rloo"].bound("advantage")(batch, context_of())
    torch.testing.assert_close(found, torch.tensor([2.5, -2.0, -0.5], dtype=torch.float64))


def test_rl_plus_without_demonstrations_is_importance_weighted_policy_gradient():
    sample = case("rl-plus", raw_batch().with_(is_external=torch.zeros(10, dtype=torch.bool)))
    now = statistics(policy_logits(), sample.batch.completion_ids)
    found = sample.token_loss("policy_loss", now).values
    expected = -sample.batch.advantages * (now.logprobs - sample.batch.old_logprobs).exp()
    mask = sample.batch.policy_mask
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-14)


def test_rl_plus_gradient_of_demonstrations_treats_exploration_as_a_constant():
    sample = case("rl-plus", gamma=0.8)
    batch, now = sample.batch, statistics(policy_logits(), sample.batch.completion_ids)
    logprobs = now.logprobs.requires_grad_()
    found = sample.token_loss("policy_loss", TokenStatistics(logprobs=logprobs, entropies=now.entropies))
    mask = batch.external_mask & batch.policy_mask
    (derivative,) = torch.autograd.grad(found.values[mask].sum(), logprobs)
    p, q = logprobs.detach().exp(), batch.old_logprobs.exp()
    expected = -batch.advantages * (1 - p) ** 0.8 * 2 * p / (1.5 * q + 0.5)
    torch.testing.assert_close(derivative, torch.where(mask, expected, 0.0), rtol=0, atol=1e-14)


def test_rl_plus_without_uniform_part_has_four_thirds_of_the_ratio():
    sample = case("rl-plus", gamma=0.0, behaviour_probability=0.0)
    batch, now = sample.batch, statistics(policy_logits(), sample.batch.completion_ids)
    found = sample.token_loss("policy_loss", now).metrics["ratio"]
    mask = batch.external_mask & batch.policy_mask
    expected = 4 / 3 * (now.logprobs - batch.old_logprobs).exp()
    torch.testing.assert_close(found[mask], expected[mask])


def test_rl_plus_refuses_what_is_no_probability():
    sample = case("rl-plus")
    now = statistics(policy_logits(), sample.batch.completion_ids)
    with pytest.raises(ValueError, match="behaviour_probability"):
        rl_plus.policy_loss(now, sample.batch, sample.context, behaviour_probability=152064.0)


def test_hbpo_never_rewards_a_subgroup_beyond_its_budget():
    torch.manual_seed(1)
    for _ in range(20):
        batch = raw_batch().with_(rewards=torch.rand(10).double().round())
        inter = hbpo.advantage(batch, context_of(), intra_weight=0.0)
        intra = hbpo.advantage(batch, context_of()) - inter
        assert (intra <= 1e-12).all()
        twice = hbpo.advantage(batch, context_of(), intra_weight=2.0)
        torch.testing.assert_close(twice, inter + 2 * intra)


def test_hbpo_pushes_down_a_group_of_wrong_answers_most_where_the_budget_is_small():
    found = hbpo.advantage(raw_batch().with_(rewards=torch.zeros(10, dtype=torch.float64)), context_of())
    assert (found[:8] < 0).all()
    assert (found[:4].diff() > 0).all()


def test_hbpo_refuses_completions_without_budget():
    with pytest.raises(ValueError, match="budget"):
        hbpo.advantage(raw_batch().with_(budgets=torch.full((10,), -1)), context_of())


def test_rover_is_twice_reinforce_in_the_first_update():
    sample, now, logits = on_policy("rover", rho=1.5)
    mask = sample.batch.policy_mask
    found = sample.token_loss("policy_loss", now)
    torch.testing.assert_close(found.values[mask], sample.batch.advantages[mask].square())
    plain = reinforce.policy_loss(now, sample.batch, sample.context).values
    expected = 2 * 1.5 * gradient(plain, mask, logits)
    torch.testing.assert_close(gradient(found.values, mask, logits), expected, rtol=0, atol=1e-14)


def test_rover_does_not_see_a_constant_added_to_all_logits_and_has_no_gradient_through_the_next_value():
    sample = case("rover")
    logits = policy_logits().requires_grad_()
    ids = sample.batch.completion_ids
    found = sample.loss(statistics(logits, ids))
    shift = torch.randn(10, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(sample.loss(statistics(logits + shift, ids)), found, rtol=0, atol=1e-14)
    now = statistics(logits, ids)
    means = now.mean_vocab_logprobs.detach().requires_grad_()
    alone = TokenStatistics(
        logprobs=now.logprobs.detach(), entropies=now.entropies.detach(), mean_vocab_logprobs=means
    )
    assert not sample.loss(alone).requires_grad


def test_rover_next_value_is_a_difference_of_divergences_from_the_uniform_distribution():
    sample = case("rover")
    batch = sample.batch
    now = statistics(policy_logits(), batch.completion_ids)
    found = rover.policy_loss(now, batch, sample.context, rho=0.5).metrics["next_q"]
    to_old = -math.log(7) - batch.old_mean_vocab_logprobs
    to_new = -math.log(7) - now.mean_vocab_logprobs
    expected = 0.5 * (to_old - to_new)[:, 1:]
    inside = batch.policy_mask[:, 1:]
    torch.testing.assert_close(found[:, :-1][inside], expected[inside])
    last = batch.lengths - 1
    assert (found[torch.arange(10), last] == 0).all()


def test_rover_asks_for_what_it_needs():
    sample = case("rover")
    now = statistics(policy_logits(), sample.batch.completion_ids)
    with pytest.raises(ValueError, match="old_mean_vocab_logprobs"):
        rover.policy_loss(now, sample.batch.with_(old_mean_vocab_logprobs=None), sample.context)
    bare = TokenStatistics(logprobs=now.logprobs, entropies=now.entropies)
    with pytest.raises(ValueError, match="mean over the vocabulary"):
        rover.policy_loss(bare, sample.batch, sample.context)


@pytest.mark.parametrize(("name", "off"), [("dph-rl", {"eta": 0.0}), ("epo", {"entropy_weight": 0.0})])
def test_regularizers_of_weight_0_leave_the_base_method(name, off):
    sample = case(name, **off)
    now = statistics(policy_logits(), sample.batch.completion_ids)
    values = sample.token_loss("policy_loss", now).values
    mask = sample.batch.policy_mask
    expected = reduce_loss(values, mask, sample.algorithm.reduction, sample.counts("policy_loss"))
    assert float(sample.loss(now)) == float(expected)


def test_dph_rl_without_rehearsal_adds_nothing():
    batch = raw_batch().with_(is_rehearsal=torch.zeros(10, dtype=torch.bool), ref_logprobs=None)
    now = statistics(policy_logits(), batch.completion_ids)
    found = dph_rl.regularizer(now, batch, context_of())
    assert (found.values == 0).all()


def test_dph_rl_pulls_back_lost_tokens_by_the_forward_divergence_alone():
    far = torch.tensor([-60.0, -10.0, 10.0], dtype=torch.float64, requires_grad=True)
    for divergence, expected in (("forward", -1.0), ("js", 0.0), ("alpha", 0.0)):
        values = dph_rl.generator(far, divergence, 0.2)
        (slope,) = torch.autograd.grad(values.sum(), far)
        assert values.isfinite().all()
        assert float(slope[0]) == pytest.approx(expected, abs=1e-4)
        assert slope[2] > 0
    assert float(dph_rl.generator(far.detach(), "js", 0.2)[0]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_dph_rl_refuses_alpha_where_the_formula_divides_by_zero(alpha):
    with pytest.raises(ValueError, match="alpha"):
        dph_rl.generator(torch.zeros(1), "alpha", alpha)


def test_dph_rl_alpha_lies_between_the_divergences():
    d = torch.linspace(-2, 2, 9, dtype=torch.float64)
    forward, reverse = d.exp() - 1 - d, d.exp() * d - d.exp() + 1
    torch.testing.assert_close(dph_rl.generator(d, "alpha", 1 - 1e-7), forward, rtol=0, atol=1e-5)
    torch.testing.assert_close(dph_rl.generator(d, "alpha", 1e-7), reverse, rtol=0, atol=1e-5)


def test_grpo_scales_by_group_batch_or_nothing():
    rewards = torch.tensor([1.0, 0.0, 5.0, 1.0], dtype=torch.float64)
    batch = tiny_batch(
        torch.zeros(4, 1, dtype=torch.long), rewards=rewards, group_ids=torch.tensor([0, 0, 1, 1])
    )
    centred = torch.tensor([0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    expected = {
        "none": centred,
        "group": centred / (torch.tensor([0.5, 0.5, 8.0, 8.0]).sqrt() + 1e-4),
        "batch": centred / (rewards.std() + 1e-4),
    }
    for scale, value in expected.items():
        found = grpo.advantage(batch, context_of(), scale_rewards=scale)
        torch.testing.assert_close(found, value, rtol=0, atol=1e-7)
