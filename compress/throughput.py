"""How fast two models are, measured side by side.

Dimensions: B sequences of a batch, S prompt positions.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..moe.data import TokenBlocks
from ..moe.evaluating import evaluating
from .fidelity import forward_arguments
from .generation import greedy_config

PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second of both models, timed in turns: comparable with each other, not with another run."""

    original: float
    compressed: float


def prefill_throughput(
    model: PreTrainedModel, blocks: TokenBlocks, *, batch_size: int = 8, repeats: int = 5
) -> float:
    """Tokens per second of forward passes over the first `batch_size` blocks.

    Median of `repeats` after one to warm up.

    Raises:
        ValueError: No blocks, or `repeats` or `batch_size` is not positive.
    """
    return _median_rates([_prefill(model, blocks, batch_size)], repeats)[0]


def decode_throughput(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    batch_size: int = 4,
    new_tokens: int = 32,
    repeats: int = 5,
) -> float:
    """New tokens per second of greedy `generate` after short prompts (the first 32 tokens of a block).

    The time to read the prompts is counted too; they are short. Median of `repeats` after one to warm up.

    Raises:
        ValueError: No blocks, or a number that is not positive.
    """
    return _median_rates([_decode(model, blocks, batch_size, new_tokens)], repeats)[0]


def compare_throughput(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    batch_size: int = 8,
    repeats: int = 5,
) -> tuple[Throughput, Throughput]:
    """Prefill and decode speed of both models, in turns so that a slow moment of the machine hits both.

    Returns:
        Prefill and decode, tokens per second.

    Raises:
        ValueError: No blocks, or `repeats` or `batch_size` is not positive.
    """
    models = (original, compressed)
    prefill = _median_rates([_prefill(model, blocks, batch_size) for model in models], repeats)
    decode = _median_rates([_decode(model, blocks, min(batch_size, 4), 32) for model in models], repeats)
    return Throughput(*prefill), Throughput(*decode)


def _prefill(model: PreTrainedModel, blocks: TokenBlocks, batch_size: int) -> Callable[[], float]:
    batch = next(_some(blocks).batches(batch_size))
    arguments, _, _ = forward_arguments(model, batch)
    num_tokens = int(batch["attention_mask"].sum())
    return lambda: num_tokens / _seconds(model, lambda: model(**arguments))


def _decode(model: Any, blocks: TokenBlocks, batch_size: int, new_tokens: int) -> Callable[[], float]:
    batch = next(_some(blocks).batches(batch_size))
    # Prompts of full length only: right padding has no place in generation.
    num_prompt = min(PROMPT_TOKENS, int(batch["attention_mask"].sum(1).min()))
    prompts_BS = batch["input_ids"][:, :num_prompt].to(model.device)
    config = greedy_config(model, max_new_tokens=new_tokens)
    config.min_new_tokens = new_tokens

    def generate() -> None:
        model.generate(
            input_ids=prompts_BS, attention_mask=torch.ones_like(prompts_BS), generation_config=config
        )

    return lambda: len(prompts_BS) * new_tokens / _seconds(model, generate)


def _some(blocks: TokenBlocks) -> TokenBlocks:
    if len(blocks) == 0:
        raise ValueError("there are no blocks to measure the speed on")
    return blocks


def _seconds(model: PreTrainedModel, run: Callable[[], object]) -> float:
    with evaluating(model):
        start = time.perf_counter()
        run()
        if model.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(model.device)
        return time.perf_counter() - start


def _median_rates(measures: list[Callable[[], float]], repeats: int) -> list[float]:
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is not a positive number")
    rounds = [[measure() for measure in measures] for _ in range(repeats + 1)]
    return [median(rates[1:]) for rates in zip(*rounds, strict=True)]
