"""A bounded sample of what each layer's experts read, for methods that must see tokens, not sums of them.

Which tokens are in it depends only on their places in the stream of tokens that count: each place has a
pseudo-random number, and those with the lowest stay. So the sample is spread evenly over everything that ran,
whatever the batches and the padding, and a recording that is gone on with is that of an uninterrupted one.
"""

# T tokens, D hidden (model) width, K active experts, N tokens of the stream so far

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from .activations import expert_inputs
from .discovery import expert_layers
from .layer import ExpertLayer
from .masks import AttentionMasks, LayerMasks
from .samples_file import check_sample, read_samples, write_samples

DEFAULT_MAX_TOKENS = 2048


@dataclass(kw_only=True, eq=False)
class LayerSample:
    """Some of the tokens that one layer's experts read, in the order in which they came. On the CPU."""

    num_tokens: int
    """Tokens of the stream so far, padding not among them; the sample is of these."""
    starts_at: int = 0
    """How many of them others have seen, who sample them."""
    positions: Int64[Tensor, " T"]
    """Which of them it holds, ascending, from 0."""
    inputs: Float[Tensor, "T D"]
    """What the experts read, in the model's dtype."""
    expert_ids: Int64[Tensor, "T K"]
    """Logical experts that served the token; -1 for a choice without weights or over capacity."""

    @classmethod
    def joined(cls, parts: Sequence["LayerSample"], max_tokens: int) -> "LayerSample":
        """The sample of a stream from those of its parts, which follow each other.

        Args:
            parts: The first, then what starts where it ends, and so on; each of at most `max_tokens`.
            max_tokens: Most tokens of the result.

        Raises:
            ValueError: A part does not start where the one before it ends.
        """
        for earlier, part in itertools.pairwise(parts):
            if part.starts_at != earlier.num_tokens:
                raise ValueError(
                    f"a sample from token {part.starts_at} on does not follow one that ends at token "
                    f"{earlier.num_tokens}"
                )
        held = [part for part in parts if len(part.positions)]
        positions_N = torch.cat([part.positions for part in held])
        rows_T = _priorities(positions_N).argsort()[:max_tokens].sort().values
        return cls(
            num_tokens=parts[-1].num_tokens,
            starts_at=parts[0].starts_at,
            positions=positions_N[rows_T],
            inputs=torch.cat([part.inputs for part in held])[rows_T],
            expert_ids=torch.cat([part.expert_ids for part in held])[rows_T],
        )

    def routed_to(self, *experts: int) -> Float[Tensor, "T D"]:
        """The inputs of the tokens that went to any of some experts."""
        return self.inputs[torch.isin(self.expert_ids, torch.tensor(experts)).any(-1)]


@dataclass(kw_only=True, eq=False)
class InputSamples:
    """Samples by layer name; memory is at most ``max_tokens * (D + K + 1)`` numbers for each layer."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    """Most tokens of each layer."""
    layers: dict[str, LayerSample] = field(default_factory=dict)
    """In forward order; layers that saw no token are left out."""

    def __post_init__(self) -> None:
        """Refuse samples that are not what they should be."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        for name, sample in self.layers.items():
            check_sample(name, self.max_tokens, vars(sample))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the samples as one ``.safetensors`` file, the whole file or none."""
        return write_samples(path, self.max_tokens, {name: vars(s) for name, s in self.layers.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "InputSamples":
        """Read what `save` wrote.

        Raises:
            ValueError: There is no such file, or it is not whole; names the file and what is wrong.
        """
        max_tokens, records = read_samples(path)
        return cls(max_tokens=max_tokens, layers={n: LayerSample(**record) for n, record in records.items()})


class _Sampler:
    """Keeps one layer's sample in buffers that are filled once and then written over."""

    def __init__(
        self, layer: ExpertLayer, masks: LayerMasks, max_tokens: int, known: LayerSample | None
    ) -> None:
        self.layer = layer
        self.masks = masks
        self.max_tokens = max_tokens
        self.num_tokens = self.starts_at = 0
        self.positions = torch.empty(0, dtype=torch.long)
        self.rows: tuple[Tensor, Tensor] | None = None
        if known is not None:
            self.num_tokens, self.positions = known.num_tokens, known.positions
            self.starts_at = known.starts_at
        if known is not None and len(known.positions):
            self.rows = self._buffers(known.inputs, known.expert_ids)
            for buffer, values in zip(self.rows, (known.inputs, known.expert_ids), strict=True):
                buffer[: len(values)] = values

    def _buffers(self, inputs_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        made = (torch.empty(self.max_tokens, t.shape[1], dtype=t.dtype) for t in (inputs_TD, ids_TK))
        return tuple(made)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def add(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Let the tokens of one call of the experts into the sample, those with the lowest numbers."""
        if not self.masks.is_running:
            return
        ids_TK, weights_TK = self.layer.as_choices(ids, weights)
        mask_T = self.masks.of(len(ids_TK))
        rows_T = torch.arange(len(ids_TK)) if mask_T is None else mask_T.cpu().nonzero().squeeze(1)
        candidates_N = torch.cat([self.positions, self.num_tokens + torch.arange(len(rows_T))])
        self.num_tokens += len(rows_T)
        num_kept = len(self.positions)
        stays_N = torch.zeros(len(candidates_N), dtype=torch.bool)
        stays_N[_priorities(candidates_N).argsort()[: self.max_tokens]] = True
        entering = stays_N[num_kept:].nonzero().squeeze(1)
        if not len(entering):
            return
        left = (~stays_N[:num_kept]).nonzero().squeeze(1)
        slots = torch.cat([left, torch.arange(num_kept, self.max_tokens)])[: len(entering)]
        self.positions = torch.cat([self.positions, self.positions.new_empty(int(stays_N.sum()) - num_kept)])
        self.positions[slots] = candidates_N[num_kept + entering]
        rows_T = rows_T[entering].to(ids_TK.device)
        ids_TK, weights_TK = ids_TK[rows_T], weights_TK[rows_T]
        inputs_TD = expert_inputs(self.layer, hidden.detach().flatten(0, -2)[rows_T], weights_TK)
        served_TK = (weights_TK != 0) & (ids_TK < self.layer.num_experts)
        new = inputs_TD, ids_TK.masked_fill(~served_TK, -1)
        self.rows = self.rows or self._buffers(*new)
        for buffer, values in zip(self.rows, new, strict=True):
            buffer[slots] = values.to(buffer)

    def finish(self) -> LayerSample:
        """The sample, in the order of the tokens."""
        assert self.rows is not None
        order_T = self.positions.argsort()
        inputs_TD, ids_TK = (buffer[order_T] for buffer in self.rows)
        return LayerSample(
            num_tokens=self.num_tokens,
            starts_at=self.starts_at,
            positions=self.positions[order_T],
            inputs=inputs_TD,
            expert_ids=ids_TK,
        )


def _priorities(positions_N: Tensor) -> Tensor:
    """A pseudo-random number for each place in the stream, no two the same (SplitMix64)."""
    mixed = (positions_N.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy((mixed ^ (mixed >> np.uint64(31))).view(np.int64))


@contextmanager
def record_inputs(
    model: PreTrainedModel,
    layers: list[ExpertLayer] | None = None,
    *,
    samples: InputSamples | None = None,
) -> Iterator[InputSamples]:
    """Sample what the experts read of everything that `model` computes inside the context.

    Positions whose ``attention_mask`` is 0 do not count, nor do repeats by gradient checkpointing, as in
    ``record_routing``, which may run at the same time. Deterministic: the same stream of tokens gives the
    same sample, whatever the batches (up to how the model itself rounds in them). Memory is that of the
    sample, on the CPU: for each layer 17 MB for 2,048 tokens of width 4,096 in bfloat16.

    Args:
        model: Any supported model, merged ones included (ids are of logical experts).
        layers: The layers to sample; all by default.
        samples: Samples to go on with, changed in place; ``InputSamples(max_tokens=...)`` starts with another
            size than 2,048 tokens.

    Yields:
        Samples by layer name, filled when the context ends. Layers that never ran are left out.

    Raises:
        ValueError: A mask does not say which positions are padding.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334, which
    matches neurons by their activations on such tokens.
    """
    layers = expert_layers(model) if layers is None else layers
    samples = InputSamples() if samples is None else samples
    masks = AttentionMasks(model)
    samplers = [
        _Sampler(layer, masks.around(layer), samples.max_tokens, samples.layers.get(layer.name))
        for layer in layers
    ]
    with ExitStack() as stack:
        stack.enter_context(masks.watch())
        for sampler in samplers:
            stack.enter_context(sampler.layer.observe(sampler.add))
        yield samples
    for sampler in samplers:
        if sampler.rows is not None:
            samples.layers[sampler.layer.name] = sampler.finish()
