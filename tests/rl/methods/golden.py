"""What tests with values worked out elsewhere share."""

import torch
from moekit.rl.algorithm import TokenStatistics
from moekit.rl.reduction import count, reduce_loss


def near(found, expected, atol=1e-6):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=0, atol=atol)


def stats(logprobs, entropies=None, means=None):
    entropies = torch.zeros_like(logprobs) if entropies is None else entropies
    return TokenStatistics(logprobs=logprobs, entropies=entropies, mean_vocab_logprobs=means)


def reduced(values, mask, reduction, max_length=1):
    return reduce_loss(values, mask, reduction, count(mask, mask.any(1), max_length))
