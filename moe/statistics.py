"""Routing statistics: what each MoE layer of a model did with the tokens that it saw.

Everything is an additive sum over tokens (one elementwise maximum excepted), so ``stats(A) + stats(B)``
equals ``stats(A and B)`` whatever the batches, the shards or the processes; memory is O(E^2 + E D) per layer.

E experts (logical: the rows of the router), D hidden size, K active experts, T tokens.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float64, Int64
from torch import Tensor

from .statistics_file import TENSORS, read_records, write_records

_MAXIMA = {"max_output_norm"}


@dataclass(kw_only=True, eq=False)
class LayerStatistics:
    """What one MoE layer did with the tokens that it saw, padding not among them. Tensors live on the CPU."""

    num_tokens: int
    """Tokens seen."""
    top_k: int
    """Experts that the router selects for each token."""
    counts: Int64[Tensor, "E"]
    """Tokens for which the router selected the expert (hard top-k)."""
    routing_weight_sums: Float64[Tensor, "E"]
    """Sum of the routing weights of those tokens."""
    logit_gram: Float64[Tensor, "E E"]
    """Sum over all tokens of h h^T, where h are the E router logits; zero for a router without logits."""
    coactivation: Int64[Tensor, "E E"]
    """Tokens that selected both experts."""
    output_norm_sums: Float64[Tensor, "E"]
    """Sum of ||f_e(x)|| over the expert's tokens."""
    gated_output_norm_sums: Float64[Tensor, "E"]
    """Sum of w_e ||f_e(x)|| over the expert's tokens, where w_e is the routing weight."""
    output_square_sums: Float64[Tensor, "E"]
    """Sum of ||f_e(x)||^2 over the expert's tokens."""
    output_sums: Float64[Tensor, "E D"]
    """Sum of f_e(x) over the expert's tokens."""
    max_output_norm: Float64[Tensor, "E"]
    """Largest ||f_e(x)||; the only entry that is not a sum."""
    router_entropy_sum: float
    """Sum over all tokens of the entropy of softmax(router logits), in nats."""

    @classmethod
    def zeros(cls, num_experts: int, hidden_size: int, top_k: int) -> "LayerStatistics":
        """Returns the statistics of no tokens at all.

        Raises:
            ValueError: A size is below 1, or ``top_k`` exceeds ``num_experts``.
        """
        if num_experts < 1 or hidden_size < 1:
            raise ValueError(
                f"num_experts={num_experts} and hidden_size={hidden_size} must both be at least 1"
            )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} is not between 1 and {num_experts} experts")
        size = {"E": num_experts, "D": hidden_size}
        tensors: dict[str, Any] = {
            name: torch.zeros([size[axis] for axis in axes.split()], dtype=dtype)
            for name, (dtype, axes) in TENSORS.items()
        }
        return cls(num_tokens=0, top_k=top_k, router_entropy_sum=0.0, **tensors)

    @property
    def num_experts(self) -> int:
        """E: the logical experts."""
        return self.output_sums.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.output_sums.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {name: getattr(self, name) for name in TENSORS}

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        if (self.num_experts, self.hidden_size, self.top_k) != (
            other.num_experts,
            other.hidden_size,
            other.top_k,
        ):
            raise ValueError(f"cannot add statistics of {_shape(self)} to statistics of {_shape(other)}")
        summed: dict[str, Any] = {
            name: torch.maximum(mine, theirs) if name in _MAXIMA else mine + theirs
            for (name, mine), theirs in zip(self.tensors.items(), other.tensors.values(), strict=True)
        }
        return LayerStatistics(
            num_tokens=self.num_tokens + other.num_tokens,
            top_k=self.top_k,
            router_entropy_sum=self.router_entropy_sum + other.router_entropy_sum,
            **summed,
        )

    @property
    def usage(self) -> Float64[Tensor, "E"]:
        """Share of the T K routing slots that each expert took, in [0, 1]; zero before any token."""
        return self.counts.double() / max(self.num_tokens * self.top_k, 1)

    @property
    def mean_routing_weight(self) -> Float64[Tensor, "E"]:
        """Mean routing weight over the tokens that selected the expert; 0 where none did."""
        return self.routing_weight_sums / self.counts.clamp(min=1)

    @property
    def mean_output(self) -> Float64[Tensor, "E D"]:
        """Mean of f_e(x) over the tokens that selected the expert; 0 where none did."""
        return self.output_sums / self.counts.clamp(min=1)[:, None]

    @property
    def output_deviation(self) -> Float64[Tensor, "E"]:
        """``sqrt(sum_x ||f_e(x) - mean||^2 / (n - 1))`` over the n tokens that selected the expert.

        0 for fewer than two of them.
        """
        apart_E = self.output_square_sums - self.counts * self.mean_output.square().sum(-1)
        return (apart_E.clamp(min=0) / (self.counts - 1).clamp(min=1)).sqrt()

    @property
    def logit_cosine(self) -> Float64[Tensor, "E E"]:
        """Cosine in [-1, 1] between the experts' router logits, each a vector over all tokens.

        An expert whose logits are all zero is similar to itself alone.

        Reference: Li et al., Merge, Then Compress (ICLR 2024), section 3.1, arXiv:2310.01334.
        """
        norm_E = self.logit_gram.diagonal().clamp(min=0).sqrt()
        cosine_EE = self.logit_gram / (norm_E[:, None] * norm_E).clamp(min=torch.finfo(torch.float64).tiny)
        return cosine_EE.clamp(-1, 1).fill_diagonal_(1)

    @property
    def entropy(self) -> float:
        """Mean entropy of softmax(router logits) in nats: 0 is a certain router, log E an undecided one."""
        return self.router_entropy_sum / max(self.num_tokens, 1)

    @property
    def load_entropy(self) -> float:
        """Entropy of ``usage`` divided by log E: 1 when all experts have equal load, 0 when one has it all.

        1 for a layer of one expert, 0 before any token.
        """
        if self.num_experts == 1:
            return 1.0
        share_E = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(share_E).sum()) / math.log(self.num_experts)

    @property
    def dead(self) -> list[int]:
        """The experts that no token selected."""
        return self.too_few(1)

    def too_few(self, min_tokens: int) -> list[int]:
        """Returns the experts that fewer than ``min_tokens`` tokens selected: too few to judge them by."""
        return torch.nonzero(self.counts < min_tokens).flatten().tolist()


@dataclass(kw_only=True, eq=False)
class RoutingStatistics:
    """The statistics of every MoE layer of a model, in forward order."""

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    """By ``ExpertLayer.name``."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    """What was recorded on what, by the caller: "model", "tokenizer", "data" (a hash of the tokens)."""

    def __add__(self, other: "RoutingStatistics") -> "RoutingStatistics":
        fingerprint = _add_fingerprints(self.fingerprint, other.fingerprint)
        # Statistics without layers are the neutral element, so that shards can be added up from nothing.
        if not self.layers or not other.layers:
            return RoutingStatistics(layers={**self.layers, **other.layers}, fingerprint=fingerprint)
        if different := sorted(self.layers.keys() ^ other.layers.keys()):
            raise ValueError(
                f"cannot add statistics of different models: only one of them has layer '{different[0]}'"
            )
        layers = {}
        for name, layer in self.layers.items():
            try:
                layers[name] = layer + other.layers[name]
            except ValueError as error:
                raise ValueError(f"layer '{name}': {error}") from None
        return RoutingStatistics(layers=layers, fingerprint=fingerprint)

    def coverage(self, min_tokens: int) -> dict[str, list[int]]:
        """Returns for each layer the experts that fewer than ``min_tokens`` tokens selected."""
        return {name: layer.too_few(min_tokens) for name, layer in self.layers.items()}

    def all_reduce(
        self, process_group: dist.ProcessGroup | None = None, device: torch.device | None = None
    ) -> "RoutingStatistics":
        """Returns the statistics of all processes together; every process must call it.

        A layer that a process has not seen counts as no tokens there.

        Args:
            process_group: None is the default group.
            device: Where the group's backend communicates; None is the CPU (gloo), NCCL needs CUDA.
        """

        def reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
            received = tensor.clone() if device is None else tensor.to(device, copy=True)
            dist.all_reduce(received, op=operation, group=process_group)
            return received.cpu()

        sizes: list[Any] = [None] * dist.get_world_size(process_group)
        own = {name: (part.num_experts, part.hidden_size, part.top_k) for name, part in self.layers.items()}
        dist.all_gather_object(sizes, own, group=process_group)
        layers = {}
        for name, size in {name: size for part in sizes for name, size in part.items()}.items():
            layer = self.layers.get(name) or LayerStatistics.zeros(*size)
            tensors: dict[str, Any] = {
                key: reduced(tensor, dist.ReduceOp.MAX if key in _MAXIMA else dist.ReduceOp.SUM)
                for key, tensor in layer.tensors.items()
            }
            layers[name] = LayerStatistics(
                num_tokens=int(reduced(torch.tensor(layer.num_tokens), dist.ReduceOp.SUM)),
                top_k=layer.top_k,
                router_entropy_sum=float(
                    reduced(torch.tensor(layer.router_entropy_sum, dtype=torch.float64), dist.ReduceOp.SUM)
                ),
                **tensors,
            )
        return RoutingStatistics(layers=layers, fingerprint=dict(self.fingerprint))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file that carries the scalars as JSON; it appears whole or not at all.

        Args:
            path: A ``.safetensors`` file, or a folder, which gets ``routing_statistics.safetensors``.

        Returns:
            The file written.

        Raises:
            ValueError: A number is not finite, or a count is negative; the message names the layer.
        """
        records = {name: vars(layer) for name, layer in self.layers.items()}
        return write_records(path, records, self.fingerprint)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingStatistics":
        """Reads what ``save`` wrote, and checks every number of it.

        Args:
            path: The file, or the folder that holds it.

        Raises:
            ValueError: There is no such file, or it is not whole and sound; the message says what is wrong.
        """
        records, fingerprint = read_records(path)
        layers = {name: LayerStatistics(**record) for name, record in records.items()}
        return cls(layers=layers, fingerprint=fingerprint)


def _shape(layer: LayerStatistics) -> str:
    return f"{layer.num_experts} experts, hidden size {layer.hidden_size}, top_k={layer.top_k}"


def _add_fingerprints(mine: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Joins the hashes of the data; everything else must agree where both say it."""
    joined = {**mine, **theirs}
    for key in mine.keys() & theirs.keys():
        if key == "data":
            joined[key] = "+".join(sorted([*mine[key].split("+"), *theirs[key].split("+")]))
        elif mine[key] != theirs[key]:
            raise ValueError(
                f"cannot add statistics of different origin: {key} is '{mine[key]}' and '{theirs[key]}'"
            )
    return joined
