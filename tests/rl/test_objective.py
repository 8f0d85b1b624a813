"""The trainer's own terms beside a method's loss, worked out by hand."""

import math

import pytest
import torch
from accelerate import Accelerator
from moekit.rl import (
    ALGORITHMS,
    MethodContext,
    PolicySettings,
    Prompt,
    Rollout,
    RolloutGroup,
    TokenStatistics,
    policy_batch,
)
from moekit.rl.objective import Objective
from moekit.rl.sums import Sums
from moekit.rl.surrogate import k3

from .tiny_rl import SETTINGS

LENGTHS = (1, 3)


def made_batch():
    prompt = Prompt(index=0, text="a", ids=(3,), given="a")
    rollouts = tuple(Rollout(completion_ids=(4,) * n, text="", is_truncated=False) for n in LENGTHS)
    group = RolloutGroup(prompt=prompt, rollouts=rollouts, rewards=torch.tensor([0.0, 1.0]))
    batch = policy_batch([group], pad_id=1)
    zeros = torch.zeros(batch.completion_ids.shape)
    return batch.with_(advantages=zeros, old_logprobs=zeros - 1, ref_logprobs=zeros - 2)


def loss_of(name, copies=1, router_loss=None, **settings):
    """Of a batch whose advantages are 0, `copies` times in a mini-batch."""
    objective = Objective(
        accelerator=Accelerator(cpu=True),
        algorithm=ALGORITHMS[name],
        settings=PolicySettings(**{**SETTINGS, **settings}),
    )
    batch, sums = made_batch(), Sums()
    # 9 where padding is, which must not count.
    entropies = torch.tensor([[0.6, 9.0, 9.0], [0.3, 0.2, 0.1]])
    logprobs = torch.tensor([[-1.0, 9.0, 9.0], [-2.0, -2.0, -3.0]])
    now = TokenStatistics(logprobs=logprobs, entropies=entropies, router_loss=router_loss)
    micros = [batch] * copies
    counts = objective.counts(micros)
    context = MethodContext(step=0, total_steps=1, max_completion_length=6)
    return float(sum(objective.loss(now, micro, counts, context, sums) for micro in micros))


BONUS = {"sequence-mean": (0.6 + 0.2) / 2, "token-mean": 1.2 / 4, "fixed-length": 1.2 / (2 * 6)}
FIRST, LAST = math.exp(-1), math.e - 2
"""e^d - d - 1 where the reference is 1 below and 1 above the policy; elsewhere they agree."""
KL = {
    "sequence-mean": (FIRST + LAST / 3) / 2,
    "token-mean": (FIRST + LAST) / 4,
    "fixed-length": (FIRST + LAST) / (2 * 6),
}


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("grpo", "sequence-mean"),
        ("dapo", "token-mean"),
        ("dr-grpo", "fixed-length"),
        ("rl-plus", "token-mean"),  # its own loss is a sum
    ],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_entropy_bonus_and_divergence_are_means(name, reduction, copies):
    assert loss_of(name, copies) == 0
    assert loss_of(name, copies, entropy_coef=0.5) == pytest.approx(-0.5 * BONUS[reduction])
    assert loss_of(name, copies, beta=0.5) == pytest.approx(0.5 * KL[reduction])
    both = loss_of(name, copies, beta=0.5, entropy_coef=0.5)
    assert both == pytest.approx(0.5 * (KL[reduction] - BONUS[reduction]))


def test_the_router_loss_is_a_mean_over_micro_batches():
    for copies in (1, 4):
        loss = loss_of("grpo", copies, router_loss=torch.tensor(2.0), router_aux_loss_coef=0.1)
        assert loss == pytest.approx(0.2)


def test_a_reference_that_is_far_gives_a_finite_divergence():
    logprobs = torch.tensor([[0.0, -200.0, -1.0]], requires_grad=True)
    found = k3(logprobs, torch.tensor([[-200.0, 0.0, -1.0]]))
    assert found.isfinite().all()
    assert (found[0, 0], found[0, 2]) == (199, 0)
    found.sum().backward()
    assert logprobs.grad.tolist() == [[1.0, 0.0, 0.0]]
