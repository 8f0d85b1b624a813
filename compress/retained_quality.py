"""How much a compressed model has kept of what the original knows: 1 for all of it, 0 for nothing."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..moe.data import TokenBlocks
from ..moe.evaluating import evaluating
from .fidelity import compare_models, forward_arguments


@torch.no_grad()
def context_information(model: PreTrainedModel, blocks: TokenBlocks, batch_size: int = 8) -> float:
    """What the context tells a model of the next token, nats: mean KL of its predictions from their mean.

    A model that predicts the same for every context, as well as that can be done, is as far as this from the
    original: it has lost all that the context tells.

    Args:
        model: The original.
        blocks: Text.
        batch_size: Blocks at a time; logits of one batch are held.
    """
    total_V: Tensor | None = None
    entropy, count = 0.0, 0
    with evaluating(model):
        for batch in blocks.batches(batch_size):
            arguments, _, counts = forward_arguments(model, batch)
            logits = model(**arguments).logits[:, : counts.shape[1]]
            probabilities = logits[counts.bool().to(logits.device)].float().softmax(-1)
            entropy += float(torch.special.entr(probabilities).sum(dtype=torch.float64))
            count += len(probabilities)
            summed = probabilities.sum(0, dtype=torch.float64)
            total_V = summed if total_V is None else total_V + summed
    assert total_V is not None
    return float(torch.special.entr(total_V / count).sum()) - entropy / count


def retained_quality(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    blocks: TokenBlocks,
    information: float,
    batch_size: int = 8,
) -> float:
    """``1 - KL / information``: at most 1, below 0 for a model that is worse than one without context.

    Args:
        original: The reference.
        compressed: The model to judge.
        blocks: Held-out text.
        information: ``context_information`` of the original on the same text.
        batch_size: Blocks at a time.
    """
    return 1 - compare_models(original, compressed, blocks, batch_size).overall.kl.value / information
