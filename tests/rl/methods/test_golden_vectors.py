"""Values that were worked out apart from this code, from the released functions and again from the formulas.

Vectors V1 (GTPO), V2 (EPO), V3 (Clip-Cov, KL-Cov), V4 (RL-PLUS), V5 (HBPO), V6 (ROVER), V7 (DPH-RL).
"""

import pytest
import torch
from moekit.rl.algorithm import SelectionInputs, TokenStatistics
from moekit.rl.budget_reward import best_reward, budget_reward
from moekit.rl.conflicts import conflict_runs
from moekit.rl.covariance import token_covariances
from moekit.rl.methods import clip_cov, dph_rl, epo, gtpo, hbpo, kl_cov, reinforce, rl_plus, rover
from moekit.rl.reduction import count, reduce_loss

from .samples import context_of, statistics, tiny_batch


def near(found, expected, atol=1e-6):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=0, atol=atol)


def stats(logprobs, entropies=None, means=None):
    entropies = torch.zeros_like(logprobs) if entropies is None else entropies
    return TokenStatistics(logprobs=logprobs, entropies=entropies, mean_vocab_logprobs=means)


def reduced(values, mask, reduction, max_length=1):
    return reduce_loss(values, mask, reduction, count(mask, mask.any(1), max_length))


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


@pytest.mark.parametrize(
    ("uniform", "loss", "off_mean", "ratios", "row_2"),
    [
        (
            1.0,
            0.04911436,
            -0.21567825,
            (1.04016086, 0.41534117, 0.12443179),
            (-0.0885143, -0.0965732, -0.0305908),
        ),
        (
            1 / 152064,
            -0.81945460,
            -1.08424720,
            (1.47355719, 1.79977229, 2.19805411),
            (-0.1253949, -0.4184747, -0.5403776),
        ),
    ],
)
def test_v4_rl_plus(uniform, loss, off_mean, ratios, row_2):
    old = torch.tensor([[0.9, 0.5, 0.2], [0.8, 0.1, 0.02]], dtype=torch.float64).log()
    shift = torch.tensor([[0.05, -0.1, 0.2], [0.1, 0.3, 0.5]], dtype=torch.float64)
    advantages = torch.tensor([[-0.25], [0.75]], dtype=torch.float64).expand(2, 3)
    batch = tiny_batch(
        torch.zeros(2, 3, dtype=torch.long),
        is_external=torch.tensor([False, True]),
        old_logprobs=old,
        advantages=advantages,
    )
    logprobs = (old + shift).requires_grad_()
    context = context_of(max_length=3)
    found = rl_plus.policy_loss(stats(logprobs), batch, context, behaviour_probability=uniform)
    total = reduced(found.values, batch.policy_mask, "token-sum", 3)
    near(total.detach(), loss, atol=1e-8)
    near(found.values.detach().mean(1), [0.26479261, off_mean], atol=1e-8)
    explored = (1 - logprobs.detach().exp()[1]) ** 0.5
    near(found.metrics["ratio"][1] / explored, ratios, atol=1e-8)
    near(torch.autograd.grad(total, logprobs)[0], [(0.0876059, 0.0754031, 0.1017836), row_2], atol=1e-7)


def test_v5_reward():
    def reward(length, budget, is_correct=True):
        values = (torch.tensor([float(v)], dtype=torch.float64) for v in (length, budget))
        return budget_reward(torch.tensor([is_correct]), *values, 4096, 4.0)

    budgets = torch.tensor([512, 1024, 2048, 2560], dtype=torch.float64)
    near(best_reward(budgets, 4096, 4.0), [3.92314, 3.69552, 2.82843, 2.22228], atol=5e-6)
    expected = {
        (400, 512): 3.92314,
        (900, 512): 3.66938,
        (1500, 1024): 3.24003,
        (1200, 2048): 2.82843,
        (2600, 2048): 2.03624,
        (2000, 2560): 2.22228,
        (4096, 512): -0.875,
    }
    for (length, budget), value in expected.items():
        near(reward(length, budget), [value], atol=5e-6)
    near(reward(400, 512, is_correct=False), [0.0])
    near(reward(4097, 512), [0.0])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (1.0, (0.97618, 0.80988, -3.54341, -1.42011, -0.01044, -0.52959, -1.12271, -2.57905)),
        (2.0, (0.8493, 0.6830, -5.6189, -3.4956, -0.4065, -0.9257, -2.2338, -3.6902)),
        (0.0, (1.10306, 0.93676, -1.46791, 0.65539, 0.38566, -0.13349, -0.01157, -1.46791)),
    ],
)
def test_v5_advantages(weight, expected):
    lengths = torch.tensor([400, 900, 700, 1500, 1200, 2600, 2000, 3200])
    batch = tiny_batch(
        torch.zeros(8, 3200, dtype=torch.long),
        torch.arange(3200) < lengths[:, None],
        rewards=torch.tensor([1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.float64),
        budgets=torch.tensor([512, 512, 1024, 1024, 2048, 2048, 2560, 2560]),
    )
    found = hbpo.advantage(batch, context_of(max_length=4096), intra_weight=weight)
    near(found, expected, atol=1e-4 if weight == 2.0 else 6e-6)


def rover_inputs():
    i = torch.arange(56, dtype=torch.float64).reshape(2, 4, 7)
    old = 2 * torch.sin(-1 + 2 * i / 55)
    new = (old + 0.3 * torch.cos(i / 55) * torch.arange(7) / 7).requires_grad_()
    ids = torch.tensor([[1, 2, 3, 4], [0, 5, 6, 1]])
    before = statistics(old, ids)
    batch = tiny_batch(
        ids,
        torch.tensor([[True] * 4, [True] * 3 + [False]]),
        old_logprobs=before.logprobs,
        old_mean_vocab_logprobs=before.mean_vocab_logprobs,
        advantages=torch.tensor([[0.5], [-0.5]], dtype=torch.float64).expand(2, 4),
    )
    return batch, new


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 0.27162330), (0.0, 0.27559308)])
def test_v6_rover_loss(beta, expected):
    batch, new = rover_inputs()
    found = rover.policy_loss(statistics(new, batch.completion_ids), batch, context_of(), beta=beta)
    loss = reduced(found.values, batch.policy_mask, "token-mean")
    near(loss.detach(), expected, atol=1e-8)
    if beta:
        (gradient,) = torch.autograd.grad(loss, new)
        near(
            gradient[0, 0],
            [0.0180822, -0.1470673, 0.0214035, 0.0233585, 0.0255414, 0.0279792, 0.0307024],
            atol=1e-7,
        )
        near(gradient.abs().sum(), 1.77258244, atol=1e-8)


def test_v6_rover_values():
    batch, new = rover_inputs()
    found = rover.policy_loss(statistics(new, batch.completion_ids), batch, context_of()).metrics
    near(
        batch.old_logprobs,
        [[-2.041460, -2.013576, -1.956959, -1.884649], [-2.173085, -1.820102, -1.781507, -2.041437]],
    )
    near(
        batch.old_mean_vocab_logprobs,
        [[-1.950094, -1.952742, -1.954990, -1.956269], [-1.956259, -1.954963, -1.952710, -1.950069]],
    )
    near(found["q"], [[-0.096674, -0.054393, -0.012891, 0.025256], [-0.119335, 0.052661, 0.071840, 0]])
    near(found["next_q"], [[-0.013157, -0.013920, -0.013636, 0], [-0.010373, -0.007884, 0, 0]])


@pytest.mark.parametrize(
    ("divergence", "values", "gradients"),
    [
        (
            "forward",
            (3.61517019, 0.19314718, 0.00536052, 0, 0.00468982, 0.30685282, 6.69741491),
            (-0.99, -0.5, -0.1, 0, 0.1, 1, 9),
        ),
        (
            "js",
            (0.64397712, 0.08494952, 0.00263280, 0, 0.00238185, 0.16989904, 4.27362192),
            (-0.03921973, -0.20273255, -0.04866050, 0, 0.05117202, 0.57536414, 5.97837001),
        ),
        (
            "alpha",
            (1.14300710, 0.16031764, 0.00521176, 0, 0.00481034, 0.36811796, 11.81516597),
            (-0.07559432, -0.37174589, -0.09583059, 0, 0.10384827, 1.29449437, 18.45213278),
        ),
    ],
)
def test_v7_dph_rl_generators(divergence, values, gradients):
    log_ratios = torch.tensor([0.01, 0.5, 0.9, 1, 1.1, 2, 10], dtype=torch.float64).log().requires_grad_()
    found = dph_rl.generator(log_ratios, divergence, 0.2)
    near(found.detach(), values, atol=1e-8)
    near(torch.autograd.grad(found.sum(), log_ratios)[0], gradients, atol=1e-8)
