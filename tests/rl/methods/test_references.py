"""Vectorised methods against loops."""

import math

import pytest
import torch
from moekit.rl.algorithms import ALGORITHMS

from . import references
from .samples import MAX_LENGTH, case, policy_logits, statistics

ADVANTAGES = {
    "reinforce": references.mean_only,
    "rloo": references.others,
    "dr-grpo": references.mean_only,
    "rover": references.mean_only,
    "rl-plus": references.mean_only,
}


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"gtpo", "hbpo"}))
def test_advantages(name):
    sample = case(name)
    expected = torch.tensor(ADVANTAGES.get(name, references.z_score)(sample.batch), dtype=torch.float64)
    torch.testing.assert_close(sample.batch.advantages[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("overlap", ["max", "product"])
@pytest.mark.parametrize("normalisation", ["group-mean", "official"])
@pytest.mark.parametrize("initial_entropy", [0.5, 3.0])
def test_gtpo_advantages(overlap, normalisation, initial_entropy):
    settings = {
        "gamma": 0.3,
        "w": 2.5,
        "tau": 1.5,
        "overlap": overlap,
        "normalisation": normalisation,
        "initial_entropy": initial_entropy,
    }
    batch = case("gtpo", **settings).batch
    expected = references.as_matrix(references.gtpo(batch, **settings), batch.completion_ids.shape[1])
    found = torch.where(batch.token_mask, batch.advantages, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (expected == 0)[batch.policy_mask].any()


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_hbpo_advantages(weight):
    batch = case("hbpo", intra_weight=weight).batch
    expected = references.hbpo(batch, intra_weight=weight, length=MAX_LENGTH)
    torch.testing.assert_close(
        batch.advantages[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"epo", "dph-rl"}))
def test_losses(name):
    sample = case(name)
    now = statistics(policy_logits(), sample.batch.completion_ids)
    losses = references.token_losses(name, sample, now)
    expected = references.reduced(losses, sample.algorithm.reduction, 8, MAX_LENGTH)
    assert float(sample.loss(now)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", {"epsilon": 0.05}),
        ("grpo", {"delta": 1.3}),
        ("grpo", {"epsilon": 0.05, "epsilon_high": 0.6, "delta": 1.7}),
        ("dapo", {"epsilon": 0.1}),
        ("hbpo", {"epsilon": 0.05}),
        ("rover", {"rho": 0.7, "beta": 0.4}),
        ("kl-cov", {"kl_weight": 0.3, "share": 0.5}),
        ("rl-plus", {"gamma": 0.0, "behaviour_probability": 1e-4}),
        ("rl-plus", {"gamma": 1.5, "behaviour_probability": 0.0}),
    ],
)
def test_losses_with_other_settings(name, settings):
    sample = case(name, **settings)
    now = statistics(policy_logits(), sample.batch.completion_ids)
    losses = references.token_losses(name, sample, now)
    expected = references.reduced(losses, sample.algorithm.reduction, 8, MAX_LENGTH)
    assert float(sample.loss(now)) == pytest.approx(expected, abs=1e-12)
    assert expected != pytest.approx(float(case(name).loss(now)), abs=1e-6)


def test_epo_loss():
    sample = case("epo")
    batch, now = sample.batch, statistics(policy_logits(), sample.batch.completion_ids)
    (mean,) = sample.context.state["entropy_history"]
    beta_alpha = 0.1 * (1 + math.exp(-3 * 3 / 5))
    extra = {
        (i, t): references.epo(float(now.entropies[i, t]), 0.9 * mean, 1.1 * mean, 0.3, beta_alpha)
        for i, t in batch.policy_mask.nonzero().tolist()
    }
    expected = references.reduced(references.token_losses("epo", sample, now), "sequence-mean", 8, MAX_LENGTH)
    expected += references.reduced(extra, "sequence-mean", 8, MAX_LENGTH)
    assert float(sample.loss(now)) == pytest.approx(expected, abs=1e-12)
    entropies = now.entropies[batch.policy_mask]
    assert (entropies < 0.9 * mean).any()
    assert (entropies > 1.1 * mean).any()


@pytest.mark.parametrize("divergence", ["forward", "js", "alpha"])
def test_dph_rl_loss(divergence):
    sample = case("dph-rl", divergence=divergence)
    batch, now = sample.batch, statistics(policy_logits(), sample.batch.completion_ids)
    ratios = (now.logprobs - batch.ref_logprobs).exp()
    extra = {
        (i, t): 0.7 * references.dph(float(ratios[i, t]), divergence)
        for i, t in batch.rehearsal_mask.nonzero().tolist()
    }
    assert {i for i, _ in extra} == {8, 9}
    expected = references.reduced(references.token_losses("dph-rl", sample, now), "token-mean", 8, MAX_LENGTH)
    expected += references.reduced(extra, "token-mean", 2, MAX_LENGTH)
    assert float(sample.loss(now)) == pytest.approx(expected, abs=1e-12)


def test_selections():
    for name in ("clip-cov", "kl-cov"):
        sample = case(name)
        batch, now = sample.batch, statistics(policy_logits(), sample.batch.completion_ids)
        found = references.covariances(now, batch)
        if name == "kl-cov":
            ranked = sorted(found, key=lambda place: found[place], reverse=True)
            expected = set(ranked[: len(found) // 5])
        else:
            ratios = (now.logprobs - batch.old_logprobs).exp()
            expected = {
                p
                for p, c in found.items()
                if 0.05 < c < 5 and not (batch.advantages[p] > 0 and ratios[p] > 2)
            }
        assert {tuple(p) for p in batch.selected.nonzero().tolist()} == expected
        assert expected
