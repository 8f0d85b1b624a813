"""What each MoE layer suffers when it alone is compressed."""

# T tokens, D hidden width, V vocabulary

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..compress.apply import apply_layer
from ..compress.plan import CompressionPlan
from ..compress.plan_file import write_atomically
from ..moe.data import TokenBlocks
from ..moe.discovery import expert_layers
from ..moe.evaluating import evaluating
from ..moe.language_head import hidden_states, logit_scale
from ..moe.layer import ExpertLayer
from ..moe.samples import InputSamples
from ..moe.statistics import RoutingStatistics

MAX_TOKENS = 4096
"""Of the calibration text that every cut is judged on."""
LOGIT_BYTES = 64 * 2**20
"""Of the logits that are held at a time."""


def layer_sensitivities(
    model: PreTrainedModel,
    layers: list[ExpertLayer],
    blocks: TokenBlocks,
    counts: Sequence[Sequence[int]],
    plan_layers: Callable[[list[ExpertLayer], int], CompressionPlan],
    *,
    batch_size: int,
    statistics: RoutingStatistics | None = None,
    samples: InputSamples | None = None,
    progress: bool = False,
    keep: Path | None = None,
) -> list[dict[int, float]]:
    """KL from the model to itself with one layer compressed, for every layer, nats a token.

    Beside the model there are the hidden states of at most 4,096 tokens and a copy of one layer; logits are
    made in chunks. The model is left as it was.

    Args:
        model: A causal language model.
        layers: Its MoE layers.
        blocks: Calibration text, of which the first blocks are used.
        counts: Numbers of experts to compress each layer to, by ``sensitivity_counts``.
        plan_layers: Plans a list of layers that keep so many experts.
        batch_size: Blocks at a time.
        statistics: For constant experts, as ``apply_plan`` takes it.
        samples: For alignments that need them.
        progress: Show a progress bar.
        keep: A file of the losses found so far, for a run that goes on; the same for the same work.

    Returns:
        For each layer its losses by number of experts.

    Raises:
        ValueError: The model's logits cannot be made of what its head reads.
    """
    part = blocks.select(range(min(len(blocks), max(1, MAX_TOKENS // blocks.seq_len))))
    scale = logit_scale(model)
    head: Any = model.get_output_embeddings()

    def logits(hidden_TD: Tensor) -> Tensor:
        return scale(head(hidden_TD.to(model.device)).float())

    found = _read(keep, len(layers))
    cuts = [(at, kept) for at, numbers in enumerate(counts) for kept in numbers if kept not in found[at]]
    with evaluating(model):
        before_TD = _hidden(model, head, part, batch_size)
        for index, kept in tqdm(cuts, desc="cutting alone", unit="cut", disable=not progress):
            layer = layers[index]
            model.set_submodule(layer.name, copy.deepcopy(layer.block))
            try:
                stand_in = next(other for other in expert_layers(model) if other.name == layer.name)
                plan = plan_layers([stand_in], kept)
                known = statistics and statistics.layers.get(layer.name)
                apply_layer(stand_in, plan.layers[0], plan, known=known, samples=samples)
                after_TD = _hidden(model, head, part, batch_size)
            finally:
                model.set_submodule(layer.name, layer.block)
            found[index][kept] = _mean_kl(before_TD, after_TD, logits)
            if keep is not None:
                write_atomically(keep, json.dumps(found))
    return found


def _read(keep: Path | None, num_layers: int) -> list[dict[int, float]]:
    if keep is None or not keep.is_file():
        return [{} for _ in range(num_layers)]
    rows = json.loads(keep.read_text(encoding="utf-8"))
    return [{int(kept): loss for kept, loss in row.items()} for row in rows]


def _hidden(model: PreTrainedModel, head: Any, blocks: TokenBlocks, batch_size: int) -> Tensor:
    """What the head reads of every token that counts, on the CPU."""
    found = []
    for batch in blocks.batches(batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden_BSD = hidden_states(model, head, {**inputs, "use_cache": False})
        found.append(hidden_BSD[inputs["attention_mask"].bool()].cpu())
    return torch.cat(found)


def _mean_kl(before_TD: Tensor, after_TD: Tensor, logits: Callable[[Tensor], Tensor]) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs in _chunks(before_TD, after_TD, logits):
        total += (
            torch.nn.functional.kl_div(
                theirs.log_softmax(-1), mine.log_softmax(-1), log_target=True, reduction="sum"
            )
            .double()
            .cpu()
        )
    return max(0.0, float(total / len(before_TD)))  # rounding may leave less where nothing has changed


def _chunks(
    before_TD: Tensor, after_TD: Tensor, logits: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    vocabulary = logits(before_TD[:1]).shape[-1]
    size = max(1, LOGIT_BYTES // (4 * vocabulary))
    for mine, theirs in zip(before_TD.split(size), after_TD.split(size), strict=True):
        yield logits(mine), logits(theirs)
