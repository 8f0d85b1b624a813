"""AdamW, and a learning rate that is a function of the step alone."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import get_scheduler

from .settings import PolicySettings


def make_optimizer(policy: nn.Module, settings: PolicySettings) -> Optimizer:
    """AdamW over what is trained; biases and norms do not decay.

    Raises:
        ValueError: Nothing is trained.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the policy has no parameter that is trained; all have requires_grad=False")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, fused=False)


def rate_function(settings: PolicySettings) -> Callable[[int], float]:
    """The learning rate at each optimizer step; a pure function, so nothing of it has to be saved.

    Raises:
        ValueError: An unknown schedule, or one that is no function of the step.
    """
    total, warmup = settings.total_updates, settings.warmup
    steps = int(warmup * total) if warmup < 1 else int(warmup)
    name = settings.lr_scheduler
    if name == "constant" and steps:  # it would not look at the warmup
        name = "constant_with_warmup"
    # One that is thrown away; Transformers makes the function and PyTorch keeps it.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        scheduler = get_scheduler(name, optimizer, steps, total)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"lr_scheduler={settings.lr_scheduler!r} cannot be used ({error}); take constant, "
            "constant_with_warmup, linear or cosine"
        ) from error
    functions = getattr(scheduler, "lr_lambdas", None)
    if not functions:
        raise ValueError(
            f"lr_scheduler={settings.lr_scheduler!r} is no function of the step; take constant, "
            "constant_with_warmup, linear or cosine"
        )
    return lambda step: settings.learning_rate * functions[0](step)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
