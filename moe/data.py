"""From text to token blocks: the one way in which every job reads its data.

Dimensions: N blocks, S positions of a block (`seq_len`), T tokens of a domain.
"""

import hashlib
import logging
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .documents import Document, load_documents

__all__ = ["Document", "TokenBlocks", "check_tokenizer", "load_documents", "split_blocks", "token_blocks"]

logger = logging.getLogger(__name__)

# A last block that is emptier than this costs a forward pass and teaches next to nothing.
MIN_TAIL_SHARE = 0.25
TOKENIZER_BATCH = 256


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """Equally long token sequences, each from one domain, padded on the right where text ran out."""

    input_ids: Int[Tensor, "N S"]
    """Token ids, int64, on the CPU."""
    attention_mask: Int[Tensor, "N S"]
    """1 for a token, 0 for padding."""
    domains: tuple[str, ...]
    """The domain of each of the N blocks."""

    def __len__(self) -> int:
        return len(self.domains)

    @property
    def seq_len(self) -> int:
        """Positions of a block, padding included."""
        return self.input_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks, padding not counted."""
        return int(self.attention_mask.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of shape, ids and mask: equal for equal data, on every machine."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.attention_mask):
            digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "TokenBlocks":
        """Return the blocks at `indices`, in that order."""
        rows = torch.tensor(indices, dtype=torch.long)
        domains = tuple(self.domains[i] for i in indices)
        return TokenBlocks(self.input_ids[rows], self.attention_mask[rows], domains)

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield ``{"input_ids", "attention_mask"}`` of `batch_size` blocks in order, fewer in the last.

        Raises:
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a positive number of blocks")
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield {"input_ids": self.input_ids[part], "attention_mask": self.attention_mask[part]}


def token_blocks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    domain_share: Literal["equal", "proportional"] = "equal",
    seed: int = 0,
) -> TokenBlocks:
    """Tokenise, concatenate within each domain, and cut into blocks of `seq_len` tokens.

    The documents of a domain are shuffled and each is ended by the end-of-sequence token; no block mixes
    domains. A block begins with the beginning-of-sequence token if the tokenizer adds one to a text. What
    is left over at the end of a domain becomes a padded block when it fills a quarter of one, or when the
    domain has no other; else it is dropped. Blocks come in a random order that only `seed` and the data
    decide.

    Args:
        documents: Texts with domains.
        tokenizer: The model's own tokenizer.
        seq_len: Positions of a block, tokens.
        max_tokens: At most this many tokens, rounded down to whole blocks; None takes everything. Texts
            that are not needed are not tokenised.
        domain_share: How `max_tokens` is shared: "equal", so that small domains are seen too (what a small
            domain cannot fill goes to the others), or "proportional" to the length of the texts.
        seed: Of both shuffles.

    Raises:
        ValueError: No documents, fewer tokens than one sequence, `max_tokens` below one sequence, or a
            tokenizer without an end-of-sequence token.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} is too short: a next token needs blocks of at least 2")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"max_tokens={max_tokens} is less than one sequence of seq_len={seq_len}")
    if domain_share not in ("equal", "proportional"):
        raise ValueError(f"domain_share='{domain_share}' is neither 'equal' nor 'proportional'")
    texts_by_domain: dict[str, list[str]] = {}
    for document in documents:
        texts_by_domain.setdefault(document.domain, []).append(document.text)
    if not texts_by_domain:
        raise ValueError("there are no documents to tokenise")
    sizes = {domain: sum(map(len, texts)) for domain, texts in texts_by_domain.items()}
    prefix = block_prefix(tokenizer)
    parts: list[TokenBlocks] = []
    num_tokens = 0
    left = None if max_tokens is None else max_tokens // seq_len
    # Smallest first: what a domain cannot fill is then shared by the larger ones.
    order = sorted(sizes, key=lambda domain: (sizes[domain], domain))
    for position, domain in enumerate(order):
        rng = random.Random(f"{seed}/{domain}")
        weights = [1 if domain_share == "equal" else sizes[d] for d in order[position:]]
        quota = None if left is None else -(-left * weights[0] // sum(weights))
        if quota == 0:
            logger.warning("max_tokens=%s is used up: domain '%s' gets no block", max_tokens, domain)
            continue
        enough = None if quota is None else quota * (seq_len - len(prefix))
        ids_T = _tokenise(texts_by_domain[domain], tokenizer, rng, enough)
        num_tokens += len(ids_T)
        cut = _cut(ids_T, domain, tokenizer, prefix, seq_len)
        parts.append(cut.select(rng.sample(range(len(cut)), min(len(cut), quota or len(cut)))))
        left = None if left is None else left - len(parts[-1])
    if num_tokens < seq_len:
        raise ValueError(
            f"the data has only {num_tokens} tokens, less than one sequence of seq_len={seq_len}; "
            f"give more text, or --seq-len {num_tokens} or less"
        )
    ids_NS = torch.cat([part.input_ids for part in parts])
    mask_NS = torch.cat([part.attention_mask for part in parts])
    blocks = TokenBlocks(ids_NS, mask_NS, tuple(domain for part in parts for domain in part.domains))
    return blocks.select(random.Random(seed).sample(range(len(blocks)), len(blocks)))


def block_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer adds before a text: its beginning-of-sequence token, or nothing."""
    bos: Any = tokenizer.bos_token_id
    added: list[Any] = list(tokenizer("").input_ids)
    return [bos] if bos is not None and added[:1] == [bos] else []


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, which ends each document; set `tokenizer.eos_token`"
        )
    return eos


def _tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, rng: random.Random, enough: int | None
) -> Int[Tensor, " T"]:
    """Token ids of the shuffled texts, each ended by eos, until there are `enough`."""
    eos = _end_of_sequence(tokenizer)
    texts = rng.sample(texts, len(texts))
    stream = array("q")
    for start in range(0, len(texts), TOKENIZER_BATCH):
        batch = texts[start : start + TOKENIZER_BATCH]
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
            stream.extend(ids)
            stream.append(eos)
        if enough is not None and len(stream) >= enough:
            break
    return torch.from_numpy(np.array(stream, dtype=np.int64))


def _cut(
    ids_T: Int[Tensor, " T"], domain: str, tokenizer: PreTrainedTokenizerBase, prefix: list[int], seq_len: int
) -> TokenBlocks:
    room = seq_len - len(prefix)
    num_full = len(ids_T) // room
    tail = len(ids_T) - num_full * room
    keep_tail = tail > 0 and (num_full == 0 or tail >= MIN_TAIL_SHARE * room)
    num_blocks = num_full + keep_tail
    pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    body = torch.full((num_blocks * room,), pad, dtype=torch.long)
    used = min(len(ids_T), len(body))
    body[:used] = ids_T[:used]
    ids_NS = torch.cat(
        [torch.tensor(prefix, dtype=torch.long).expand(num_blocks, -1), body.view(-1, room)], dim=1
    )
    mask_NS = torch.ones_like(ids_NS)
    if keep_tail:
        mask_NS[-1, len(prefix) + tail :] = 0
    return TokenBlocks(ids_NS, mask_NS, (domain,) * num_blocks)


def split_blocks(
    blocks: TokenBlocks,
    *,
    held_out_tokens: int | None = None,
    held_out_fraction: float | None = None,
    seed: int = 0,
) -> tuple[TokenBlocks, TokenBlocks]:
    """Split into two parts that share no block, so that nothing is measured on what it was fitted to.

    Every domain gives its share; a domain never gives its last block, so that both jobs see it where
    possible and the held-out part may come out a little smaller than asked.

    Args:
        blocks: What to split.
        held_out_tokens: Size of the second part, tokens, rounded up to whole blocks.
        held_out_fraction: Or its size as a fraction of the blocks, in (0, 1).
        seed: Of the choice.

    Returns:
        The part to use and the held-out part.

    Raises:
        ValueError: Neither or both sizes are given, or nothing would be left for one of the parts.
    """
    if (held_out_tokens is None) == (held_out_fraction is None):
        raise ValueError("give either held_out_tokens or held_out_fraction")
    if held_out_tokens is not None:
        wanted = -(-held_out_tokens // blocks.seq_len)
    else:
        wanted = (
            max(1, round((held_out_fraction or 0.0) * len(blocks))) if (held_out_fraction or 0.0) > 0 else 0
        )
    if not 0 < wanted < len(blocks):
        raise ValueError(
            f"cannot hold out {wanted} of {len(blocks)} blocks of {blocks.seq_len} tokens: both parts need "
            f"at least one; use more text, a smaller --seq-len or another held-out size"
        )
    counts = Counter(blocks.domains)
    held_out: list[int] = []
    num_left = len(blocks)
    for domain in sorted(counts, key=lambda d: (counts[d], d)):
        members = [i for i, name in enumerate(blocks.domains) if name == domain]
        share = -(-(wanted - len(held_out)) * len(members) // num_left)
        held_out += random.Random(f"{seed}/{domain}").sample(members, min(share, len(members) - 1))
        num_left -= len(members)
    if not held_out:
        raise ValueError(
            "every domain has a single block: nothing can be held out; use more text or a smaller --seq-len"
        )
    chosen = set(held_out)
    return blocks.select([i for i in range(len(blocks)) if i not in chosen]), blocks.select(sorted(chosen))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that cannot be the model's.

    Embedding tables are often padded to a round size, so a tokenizer may be somewhat smaller than
    `config.vocab_size`, but not less than half of it; added tokens that the table does not hold are
    tolerated, since no text produces them, as long as the end-of-sequence token is not one of them.

    Raises:
        ValueError: The vocabularies do not fit, or there is no end-of-sequence token.
    """
    vocab_size = config.get_text_config().vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only {vocab_size}: "
            "it belongs to another model"
        )
    if 2 * len(tokenizer) < vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {vocab_size}, more than "
            "twice as many: it belongs to another model"
        )
    if _end_of_sequence(tokenizer) >= vocab_size:
        raise ValueError(
            f"the tokenizer's end-of-sequence id {tokenizer.eos_token_id} is outside the model's vocabulary "
            f"of {vocab_size}: it belongs to another model"
        )
