"""Log-probs of tokens from hidden states, without ever holding the logits of all of them."""

# N tokens, n tokens of a chunk, D hidden width, V vocabulary

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Entropies = Literal["none", "value", "gradient"]
"""Whether entropies are wanted, and whether with gradient."""


def token_logprobs(
    hidden_ND: Float[Tensor, "N D"],
    ids_N: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_size: int,
    num_chunks: int | None = None,
    entropies: Entropies = "value",
    with_mean_vocab: bool = False,
) -> dict[str, Float[Tensor, " N"]]:
    """Log-probs under ``p = softmax(z / temperature)``, z the head's logits, in single precision at least.

    The logits of one chunk are in memory at a time; with gradients they are computed again in the backward
    pass.

    Args:
        hidden_ND: What the head reads where each token is predicted.
        ids_N: The tokens.
        head: Gives the logits ``[n, V]`` of n rows.
        temperature: Above 0.
        chunk_size: Most rows of a chunk.
        num_chunks: How often the head is called, with no rows if none are left; by default as often as
            needed, once at least.
        entropies: See `Entropies`.
        with_mean_vocab: Whether the mean over the vocabulary is wanted.

    Returns:
        ``logprobs``: of the tokens. ``entropies``: of p, nats. ``mean_vocab_logprobs``: mean over the
        vocabulary of log p. Those that are wanted.

    Raises:
        ValueError: There are more tokens than the chunks hold.
    """
    needed = max(1, -(-len(ids_N) // chunk_size))
    if num_chunks is None:
        num_chunks = needed
    if num_chunks < needed:
        raise ValueError(f"{num_chunks} chunks of {chunk_size} do not hold {len(ids_N)} tokens")
    sizes = [min(chunk_size, max(0, len(ids_N) - start * chunk_size)) for start in range(num_chunks)]
    statistics: Any = _ChunkStatistics(head, temperature, entropies, with_mean_vocab)
    found = []
    for rows in zip(hidden_ND.split(sizes), ids_N.split(sizes), strict=True):
        found.append(
            checkpoint(statistics, *rows, use_reentrant=False)
            if torch.is_grad_enabled()
            else statistics(*rows)
        )
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


class _ChunkStatistics:
    """The statistics of a chunk; what needs no gradient last, so that a repetition stops before it."""

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        temperature: float,
        entropies: Entropies,
        with_mean_vocab: bool,
    ) -> None:
        self.head = head
        self.temperature = temperature
        self.entropies = entropies
        self.with_mean_vocab = with_mean_vocab

    def __call__(self, hidden_nD: Tensor, ids_n: Tensor) -> dict[str, Tensor]:
        logits_nV = self.head(hidden_nD)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        if self.temperature != 1:
            logits_nV = logits_nV / self.temperature
        lse_n = logits_nV.logsumexp(-1)
        found = {"logprobs": logits_nV.gather(1, ids_n[:, None]).squeeze(1) - lse_n}
        if self.with_mean_vocab:
            found["mean_vocab_logprobs"] = logits_nV.mean(-1) - lse_n
        if self.entropies == "gradient":
            found["entropies"] = _entropies(logits_nV, lse_n)
        elif self.entropies == "value":
            with torch.no_grad():
                found["entropies"] = _entropies(logits_nV, lse_n)
        return found


def _entropies(logits_nV: Tensor, lse_n: Tensor) -> Tensor:
    logprobs_nV = logits_nV - lse_n[:, None]
    return -torch.linalg.vecdot(logprobs_nV.exp(), logprobs_nV)
