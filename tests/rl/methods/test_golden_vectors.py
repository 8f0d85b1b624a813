"""Values that were worked out apart from this code, from the released functions and again from the formulas.

Vectors V4 (RL-PLUS), V5 (HBPO), V6 (ROVER), V7 (DPH-RL).
"""

import pytest
import torch
from moekit.rl.budget_reward import best_reward, budget_reward
from moekit.rl.methods import dph_rl, hbpo, rl_plus, rover

from .golden import near, reduced, stats
from .samples import context_of, statistics, tiny_batch


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
