"""The optimizer's groups and the learning rate as a function of the step."""

import pytest
import torch
from moekit.rl import PolicySettings
from moekit.rl.optimizer import make_optimizer, rate_function, set_rate
from torch import nn
from transformers import get_scheduler


def settings(**given):
    return PolicySettings(
        **{"steps": 5, "mini_batches": 2, "prompts_per_step": 2, "learning_rate": 0.5, **given}
    )


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 3.0])
def test_rates_are_those_of_a_scheduler_that_steps(name, warmup):
    known = "constant_with_warmup" if name == "constant" and warmup else name
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(known, optimizer, int(warmup), 10)
    rate = rate_function(settings(lr_scheduler=name, warmup=warmup))
    for number in range(10):
        assert rate(number) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_a_warmup_below_1_is_a_share_of_all_updates():
    rate = rate_function(settings(warmup=0.4))
    assert [rate(number) for number in range(6)] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_biases_and_norms_do_not_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1).requires_grad_(False))
    optimizer = make_optimizer(model, settings(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.1 if p.ndim > 1 else 0.0 for p in model.parameters() if p.requires_grad}
    assert decays == expected
    set_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
