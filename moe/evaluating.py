"""Evaluation mode for a while, without gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode comes back at the end.

    A checkpoint that says ``output_router_logits`` is spared its auxiliary loss: nobody reads it here, and
    `generate` fails on it in transformers 5.23.
    """
    was_training = model.training
    config = model.config.get_text_config()
    had_router_logits = getattr(config, "output_router_logits", None)
    model.eval()
    if had_router_logits:
        config.output_router_logits = False
    try:
        # Not inference mode: what a model caches under it (rotary tables) cannot be trained with later.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if had_router_logits:
            config.output_router_logits = had_router_logits
