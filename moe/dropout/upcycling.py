"""Copies of a dense FFN that are not all the same: Drop-Upcycling."""

# D hidden (model) width, F FFN width

import torch
from torch import Tensor

from ..weights import ExpertWeights


@torch.no_grad()
def drop_upcycle(weights: ExpertWeights, fraction: float, generator: torch.Generator) -> ExpertWeights:
    """Copy a dense FFN with a random share of its neurons drawn anew.

    The same neurons are replaced in gate, up and down; each matrix draws from N(m, s^2) with the mean and the
    standard deviation of the very entries that it loses. Biases of the neurons are replaced in the same way;
    the output bias belongs to no neuron and stays.

    Args:
        weights: The dense FFN, which is not changed.
        fraction: r, from 0 (an exact copy) to 1 (nothing stays); rounded to whole neurons. The paper's best
            is 0.5.
        generator: On the CPU. What is drawn depends on it alone, not on device or dtype; go on with it for
            the next expert.

    Returns:
        New tensors of the same device and dtype.

    Raises:
        ValueError: `fraction` is not between 0 and 1.

    Reference: Nakamura et al., Drop-Upcycling (ICLR 2025), section 3, arXiv:2502.19261.

    *Departs from the release*, which draws other neurons for each matrix, where the paper has one set, and
    shuffles the neurons of every expert, which changes no output.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} is not between 0 and 1")
    dropped = torch.randperm(weights.width, generator=generator)[: round(fraction * weights.width)]
    copies = {name: tensor.detach().clone() for name, tensor in weights.named_tensors()}
    for name, copy in copies.items():
        if name != "down_bias" and len(dropped):
            _draw_anew(copy.T if name == "down" else copy, dropped, generator)
    return ExpertWeights(**copies)


def _draw_anew(rows: Tensor, dropped: Tensor, generator: torch.Generator) -> None:
    """Replace some rows by normal numbers of the same mean and deviation, in place."""
    dropped = dropped.to(rows.device)
    old = rows[dropped].float()
    drawn = torch.randn(old.shape, generator=generator).to(rows.device)
    rows[dropped] = (old.mean() + old.std(correction=0) * drawn).to(rows.dtype)
