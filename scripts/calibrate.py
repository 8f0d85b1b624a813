"""Text to routing statistics, in steps that an interrupted run need not repeat."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..compress.fidelity import forward_arguments
from ..moe.data import TokenBlocks, load_documents, split_blocks, token_blocks
from ..moe.discovery import expert_layers
from ..moe.evaluating import evaluating
from ..moe.layer import ExpertLayer
from ..moe.recording import record_routing
from ..moe.samples import InputSamples, record_inputs
from ..moe.statistics import LayerStatistics, RoutingStatistics
from .processes import Processes

logger = logging.getLogger(__name__)

NO_DATA = "none: token ids spread over the vocabulary, only to check that the result reads back"
PROBE_BLOCKS, PROBE_TOKENS = 2, 32
STEPS = 16
"""Parts of a calibration; at most one part's work is lost by an interruption."""
DEFAULT_SEQ_LEN = 512


@dataclass(frozen=True, slots=True)
class Texts:
    """Two parts of the data that share no block."""

    calibration: TokenBlocks
    held_out: TokenBlocks


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was recorded."""

    statistics: RoutingStatistics
    samples: InputSamples | None
    """What the experts read, where that was asked for."""


def sequence_length(asked: int | None, config: PreTrainedConfig) -> int:
    """Tokens per sequence: as asked, else 512 or the model's context.

    Raises:
        ValueError: More than the model's context.
    """
    context = context_length(config)
    if asked is None:
        return DEFAULT_SEQ_LEN if context is None else min(DEFAULT_SEQ_LEN, context)
    if context is not None and asked > context:
        raise ValueError(f"--seq-len {asked} is more than the model's context of {context} tokens")
    return asked


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence that the model takes; None where its config sets no limit."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if type(length) is int else None


def read_texts(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    calibration_tokens: int,
    eval_tokens: int,
    seed: int,
) -> Texts:
    """Read, tokenise and split the data; where it is short of what was asked, both parts shrink alike.

    Raises:
        ValueError: No text, too little of it, or numbers that are not positive.
    """
    for flag, tokens in (("--calibration-tokens", calibration_tokens), ("--eval-tokens", eval_tokens)):
        if tokens < seq_len:
            raise ValueError(f"{flag} {tokens} is less than one sequence of {seq_len} tokens")
    wanted = calibration_tokens + eval_tokens
    documents = load_documents(data)
    blocks = token_blocks(documents, tokenizer, seq_len=seq_len, max_tokens=wanted, seed=seed)
    share = eval_tokens / wanted
    held_out = min(eval_tokens, int(share * len(blocks) * seq_len)) or 1
    return Texts(*split_blocks(blocks, held_out_tokens=held_out, seed=seed))


def probe_texts(model: PreTrainedModel) -> Texts:
    """Blocks of token ids spread over the vocabulary, for methods that read no text."""
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    size = PROBE_BLOCKS * PROBE_TOKENS
    ids = torch.arange(size).mul(vocabulary).div(size, rounding_mode="floor").view(PROBE_BLOCKS, PROBE_TOKENS)
    blocks = TokenBlocks(ids, torch.ones_like(ids), ("none",) * PROBE_BLOCKS)
    return Texts(blocks, blocks)


def check_token_ids(blocks: TokenBlocks, model: PreTrainedModel) -> None:
    """Refuse text whose tokens the model cannot look up; only its shapes are read.

    Raises:
        ValueError: A token's id is not below the number of rows of the embedding.
    """
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    largest = int(blocks.input_ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer turns the data into token id {largest}, but the model's vocabulary has "
            f"{vocabulary} tokens, 0 to {vocabulary - 1}: put the model's own tokenizer into its folder, or "
            "take that token out of the text"
        )


def calibrate(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    folder: Path,
    *,
    batch_size: int,
    progress: bool,
    sample_inputs: bool = False,
    processes: Processes | None = None,
) -> Calibration:
    """Record how a model routes, and keep what was recorded so far in a folder.

    The order of the additions is that of the blocks, and a sample depends only on the order of the tokens, so
    an interrupted and resumed calibration gives the same numbers, bit for bit, as one that was not.

    Args:
        model: The model.
        blocks: What it reads.
        folder: Where they are kept; what an earlier run with the same settings left there is used.
        batch_size: Blocks at a time.
        progress: Show a progress bar.
        sample_inputs: Also sample what the experts read.
        processes: Of which each reads its share; all return the same. None is one.
    """
    layers, processes = expert_layers(model), processes or Processes()
    if processes.count > 1:
        folder /= processes.name
        folder.mkdir(exist_ok=True)
    empty = processes.empty_samples(layers, blocks, batch_size) if sample_inputs else None
    fingerprint, blocks = {"data": blocks.fingerprint}, processes.share(blocks, batch_size)
    num_batches = -(-len(blocks) // batch_size)
    size = batch_size * -(-num_batches // STEPS)
    starts = range(0, len(blocks), size)
    done, statistics, samples = _resume(folder, len(starts), empty)
    if done:
        logger.warning("going on after step %d of %d of the calibration", done, len(starts))
    with tqdm(
        total=len(blocks), desc="calibrating", unit="seq", disable=not progress, initial=done * size
    ) as bar:
        for step in range(done, len(starts)):
            part = blocks.select(range(starts[step], min(starts[step] + size, len(blocks))))
            statistics = statistics + record(model, layers, part, batch_size, samples=samples)
            _keep(folder, step + 1, statistics, samples)
            bar.update(len(part))
    statistics, samples = processes.joined(statistics, samples)
    return Calibration(RoutingStatistics(layers=statistics.layers, fingerprint=fingerprint), samples)


def model_inputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of a forward pass; an encoder-decoder reads half of each block and continues it."""
    arguments, _, counts = forward_arguments(model, batch)
    if model.config.is_encoder_decoder:
        arguments["decoder_attention_mask"] = counts.long()
    return arguments


def even_statistics(layers: list[ExpertLayer]) -> RoutingStatistics:
    """Statistics of a model that uses all experts alike, to try out a plan before anything was measured."""
    statistics = RoutingStatistics()
    for layer in layers:
        even = LayerStatistics.zeros(layer.num_experts, layer.hidden_size, layer.top_k)
        even.num_tokens = layer.num_experts
        even.counts += layer.top_k
        even.logit_gram += torch.eye(layer.num_experts, dtype=torch.float64)
        statistics.layers[layer.name] = even
    return statistics


def record(
    model: PreTrainedModel,
    layers: list[ExpertLayer],
    blocks: TokenBlocks,
    batch_size: int,
    *,
    samples: InputSamples | None = None,
    progress: bool = False,
) -> RoutingStatistics:
    """Record how a model routes some blocks, at one go, and go on with `samples` of what its experts read."""
    total = -(-len(blocks) // batch_size)
    batches = tqdm(blocks.batches(batch_size), "routing", total=total, unit="batch", disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        statistics = stack.enter_context(record_routing(model, layers))
        if samples is not None:
            stack.enter_context(record_inputs(model, layers, samples=samples))
        for batch in batches:
            model(**model_inputs(model, batch))
    return statistics


def _kept(folder: Path) -> Iterator[tuple[int, Path]]:
    """Sums that were kept, the furthest first."""
    for path in sorted(folder.glob("calibration-*.safetensors"), reverse=True):
        yield int(path.stem.rpartition("-")[2]), path


def _inputs_file(folder: Path, step: int) -> Path:
    return folder / f"inputs-{step:04d}.safetensors"


def _resume(
    folder: Path, num_steps: int, empty: InputSamples | None
) -> tuple[int, RoutingStatistics, InputSamples | None]:
    for step, path in _kept(folder):
        try:
            if step <= num_steps:
                samples = None if empty is None else InputSamples.load(_inputs_file(folder, step))
                return step, RoutingStatistics.load(path), samples
        except ValueError as error:
            logger.warning("%s", error)
    return 0, RoutingStatistics(), empty


def _keep(folder: Path, step: int, statistics: RoutingStatistics, samples: InputSamples | None) -> None:
    # The sums are what counts as kept, so they come last, and go first.
    if samples is not None:
        samples.save(_inputs_file(folder, step))
    statistics.save(folder / f"calibration-{step:04d}.safetensors")
    for earlier, path in _kept(folder):
        if earlier < step:
            path.unlink()
    for path in folder.glob("inputs-*.safetensors"):
        if path != _inputs_file(folder, step):
            path.unlink()
