"""Values that were worked out apart from this code, from the released functions and again from the formulas.

Vectors V1 (GTPO), V2 (EPO), V3 (Clip-Cov, KL-Cov).
"""

import pytest
import torch
from moekit.rl.algorithm import SelectionInputs
from moekit.rl.conflicts import conflict_runs
from moekit.rl.covariance import token_covariances
from moekit.rl.methods import clip_cov, epo, gtpo, kl_cov, reinforce

from .golden import near, reduced, stats
from .samples import context_of, tiny_batch

GTPO = {
    # ids, rewards of mean 0, lambda, conflicts that the released code counts, conflicts
    "V1a": (
        [[5, 6, 1, 2, 9, 8], [5, 6, 3, 9, 8], [5, 7, 4, 4, 4, 9, 8], [5, 6, 1, 2, 9, 8]],
        [1.5, -1, -0.5, 0],
        [[2, 2, 1, 1, 2, 2], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
        [2, 2, 2, 1],
        [4, 4, 3, 0],
    ),
    "V1b": ([[5, 6, 8], [5, 6, 8]], [1, -1], [[2, 2, 2], [0, 0, 0]], [3, 3], [3, 3]),
    "V1c": ([[5, 1, 6, 2, 8], [5, 2, 6, 3, 7]], [1, -1], [[2, 1, 1, 1, 1], [0, 1, 1, 1, 1]], [1, 1], [1, 1]),
    "V1d": (
        [[5, 1, 4, 2, 3], [5, 9, 9, 9, 9], [7, 1, 9, 9, 6]],
        [2, -1, -1],
        [[2, 2, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [2, 1, 1],
        [2, 1, 0],
    ),
}


def padded(rows, empty=0):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[empty] * (width - len(row))] for row in rows])


def gtpo_batch(ids, rewards):
    mask = padded([[1] * len(row) for row in ids]).bool()
    return tiny_batch(
        padded(ids),
        mask,
        rewards=torch.tensor(rewards, dtype=torch.float64),
        old_entropies=torch.ones(mask.shape, dtype=torch.float64),
    )


def gtpo_lambda(batch, **settings):
    """Advantages over ``A - gamma H``, with a gamma that leaves none 0."""
    found = gtpo.advantage(batch, context_of(), gamma=0.1, initial_entropy=9.0, **settings)
    return found / (batch.rewards - 0.1)[:, None]


@pytest.mark.parametrize("name", GTPO)
def test_v1_lambda_and_conflicts(name):
    ids, rewards, factors, official, union = GTPO[name]
    batch = gtpo_batch(ids, rewards)
    found = torch.where(batch.token_mask, gtpo_lambda(batch), 0.0)
    near(found, padded(factors).tolist())
    size_over_n = gtpo_lambda(batch, normalisation="official")[:, -1] / gtpo_lambda(batch)[:, -1]
    whole = size_over_n[~size_over_n.isnan()]
    near(len(ids) / whole, [n for n, x in zip(official, size_over_n.tolist(), strict=True) if x == x])
    prefix, suffix = conflict_runs(batch.completion_ids, batch.token_mask, batch.rewards, batch.group_ids)
    assert (prefix | suffix).sum(1).tolist() == union


def test_v1b_product_squares_the_overlap():
    ids, rewards, *_ = GTPO["V1b"]
    near(gtpo_lambda(gtpo_batch(ids, rewards), overlap="product"), [[4, 4, 4], [0, 0, 0]])


def test_v1e_one_sign_has_no_conflict():
    ids = torch.tensor([[5, 6, 8], [5, 6, 8]])
    for advantages in ([1.0, 0.5], [-1.0, -2.0], [0.0, 0.0]):
        for run in conflict_runs(
            ids, torch.ones_like(ids).bool(), torch.tensor(advantages), torch.tensor([0, 0])
        ):
            assert not run.any()


def test_v1f_loss_of_one_completion():
    batch = gtpo_batch([[5, 6, 1, 2], [5, 6, 3, 4]], [1.5, -1.5])
    now = stats(torch.zeros(2, 4, dtype=torch.float64))
    for normalisation, expected in (("group-mean", -2.25), ("official", -1.125 * 2)):
        found = gtpo.advantage(
            batch, context_of(), gamma=0.0, initial_entropy=9.0, normalisation=normalisation
        )
        loss = reinforce.policy_loss(
            now, batch.with_(advantages=found, old_logprobs=now.logprobs), context_of()
        )
        # The mean over 2 completions takes back the 2 that stands here for the sum over the group.
        near(loss.values[0].mean(), expected)


H = [[0.1, 0.5, 1.5], [0.05, 0.9, 2.5]]


@pytest.mark.parametrize("penalty", ["hinge", "indicator"])
def test_v2_penalty(penalty):
    batch = tiny_batch(torch.zeros(2, 3, dtype=torch.long))
    entropies = torch.tensor(H, dtype=torch.float64, requires_grad=True)
    context = context_of()
    context.state["entropy_history"] = [0.4, 0.5]
    found = epo.regularizer(
        stats(torch.zeros(2, 3, dtype=torch.float64), entropies),
        batch,
        context,
        entropy_weight=1.0,
        penalty=penalty,
    )
    smooth = (found.values + entropies) / 2  # beta is 2 at step 0
    near(found.metrics["entropy_in_range"].mean(), 4 / 6)
    if penalty == "hinge":
        near(smooth.detach() / 0.1, [[0, 0, 0.6], [0, 0, 1.6]])
        near(smooth.mean().detach(), 0.0366667, atol=1e-7)
        expected = [[0, 0, 1 / 60], [0, 0, 1 / 60]]
    else:
        near(smooth.detach(), [[0, 0, 0.1], [0, 0, 0.1]])
        expected = [[0.0] * 3] * 2
    near(torch.autograd.grad(smooth.mean(), entropies)[0], expected)


def test_v2_schedule():
    expected = {
        125: {0: 2, 1: 1.95276, 31: 1.22313, 62: 1.04979, 125: 1.00236},
        150: {1: 1.96079, 37: 1.22764, 75: 1.04979, 150: 1.00248},
    }
    for total, values in expected.items():
        for step, value in values.items():
            assert epo.smoothing(step, total, 3.0) == pytest.approx(value, abs=5e-6)


COV_OLD = torch.tensor([[0.9, 0.5, 0.2, 0.05], [0.8, 0.6, 0.3, 0.01]], dtype=torch.float64).log()
COV_MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])
COV_SHIFT = torch.tensor([[0.1, -0.2, 0.05, 0.3], [-0.1, 0.2, -0.3, 0.4]], dtype=torch.float64)
ROW_1 = (-0.015024, -0.116962, -0.150182, -0.192837)


def covariance_batch():
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 4)
    batch = tiny_batch(
        torch.zeros(2, 4, dtype=torch.long), COV_MASK, advantages=advantages, old_logprobs=COV_OLD
    )
    tokens = SelectionInputs(
        logprobs=(COV_OLD + COV_SHIFT)[COV_MASK],
        old_logprobs=COV_OLD[COV_MASK],
        advantages=advantages[COV_MASK],
        generator=torch.Generator().manual_seed(0),
    )
    return batch, tokens


def covariance_loss(policy_loss, chosen, reduction="token-mean", max_length=1, **settings):
    batch, _ = covariance_batch()
    batch = batch.with_(selected=torch.zeros_like(COV_MASK).masked_scatter(COV_MASK, chosen))
    logprobs = (COV_OLD + COV_SHIFT).requires_grad_()
    found = policy_loss(stats(logprobs), batch, context_of(), **settings)
    loss = reduced(found.values, COV_MASK, reduction, max_length)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def test_v3_covariances():
    _, tokens = covariance_batch()
    near(
        token_covariances(tokens), [0.888257, 0.127297, -0.443810, -1.417776, -0.821162, -0.835239, 0.528357]
    )


@pytest.mark.parametrize(
    ("share", "weight", "chosen", "value", "row_1", "row_2"),
    [
        (1 / 7, 1.0, [0], -0.19399617, ROW_1, (0.129262, 0.174486, 0.105831, 0)),
        (2 / 7, 1.0, [0, 6], -0.15113903, ROW_1, (0.129262, 0.174486, -0.037026, 0)),
        (
            0.5,
            1.0,
            [0, 1, 6],
            -0.12256760,
            (ROW_1[0], -0.259819, *ROW_1[2:]),
            (0.129262, 0.174486, -0.037026, 0),
        ),
        (
            0.5,
            0.1,
            [0, 1, 6],
            -0.19971045,
            (-0.143596, -0.131247, *ROW_1[2:]),
            (0.129262, 0.174486, 0.091545, 0),
        ),
    ],
)
def test_v3_kl_cov(share, weight, chosen, value, row_1, row_2):
    _, tokens = covariance_batch()
    found = kl_cov.selection(tokens, share=share)
    assert found.nonzero().flatten().tolist() == chosen
    loss, gradient = covariance_loss(kl_cov.policy_loss, found, kl_weight=weight)
    near(loss, value, atol=1e-8)
    near(gradient, [row_1, row_2])


def test_v3_kl_cov_other_reductions():
    _, tokens = covariance_batch()
    chosen = kl_cov.selection(tokens, share=0.5)
    near(covariance_loss(kl_cov.policy_loss, chosen, "sequence-mean")[0], 0.02471412, atol=1e-8)
    near(covariance_loss(kl_cov.policy_loss, chosen, "fixed-length")[0], -0.42898659, atol=1e-8)


def test_v3_kl_cov_mean_log_ratio():
    batch, _ = covariance_batch()
    batch = batch.with_(selected=torch.zeros_like(COV_MASK))
    found = kl_cov.policy_loss(stats(COV_OLD + COV_SHIFT), batch, context_of())
    near(found.metrics["log_ratio"][COV_MASK].mean(), 0.1785714)


def test_v3_clip_cov():
    _, tokens = covariance_batch()
    chosen = clip_cov.selection(tokens, share=0.3, covariance_low=0.2)
    assert chosen.nonzero().flatten().tolist() == [0, 6]
    loss, gradient = covariance_loss(clip_cov.policy_loss, chosen)
    near(loss, -0.15623150, atol=1e-8)
    near(gradient, [(0, *ROW_1[1:]), (0.129262, 0.174486, 0, 0)])
    assert gradient[0, 0] == 0
    assert gradient[1, 2] == 0
