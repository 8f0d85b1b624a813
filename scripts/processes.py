"""Processes that `moekit compress` was started in together: each reads its share of the calibration text."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..moe.data import TokenBlocks
from ..moe.layer import ExpertLayer
from ..moe.samples import InputSamples, LayerSample
from ..moe.statistics import RoutingStatistics
from .console import silence
from .train_arguments import asked_sharding, check_launch

PATIENCE = timedelta(days=7)
"""For the process that plans and writes, while the others wait."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """All that take part, and which of them this is; a single one by default."""

    count: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this one plans, writes and speaks."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Of a folder for what only this process needs."""
        return f"process-{self.rank}-of-{self.count}"

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def same(self, value: Any) -> Any:
        """What the main process has of a small value."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def share(self, blocks: TokenBlocks, batch_size: int) -> TokenBlocks:
        """The part of a text that this process reads: whole batches, those of a single process.

        Raises:
            ValueError: There are fewer batches than processes.
        """
        if self.count == 1:
            return blocks
        batches = -(-len(blocks) // batch_size)
        if batches < self.count:
            raise ValueError(
                f"{self.count} processes were started for {batches} batches of calibration text; start "
                f"fewer, or give more --calibration-tokens or a smaller --batch-size"
            )
        first, end = (self._first(blocks, batch_size, rank) for rank in (self.rank, self.rank + 1))
        return blocks.select(range(first, end))

    def _first(self, blocks: TokenBlocks, batch_size: int, rank: int) -> int:
        """Where the share of a process begins."""
        batches = -(-len(blocks) // batch_size)
        return min(batches * rank // self.count * batch_size, len(blocks))

    def empty_samples(self, layers: list[ExpertLayer], blocks: TokenBlocks, batch_size: int) -> InputSamples:
        """Samples to begin with, which know how many tokens the processes before this one read."""
        if self.is_main:
            return InputSamples()
        before = blocks.select(range(self._first(blocks, batch_size, self.rank))).num_tokens
        return InputSamples(layers={layer.name: _nothing(layer, before) for layer in layers})

    def joined(
        self, statistics: RoutingStatistics, samples: InputSamples | None
    ) -> tuple[RoutingStatistics, InputSamples | None]:
        """What all processes saw, the same in each: sums are added, and samples are those of one stream.

        Raises:
            ValueError: A layer does not read every token of the text, so that its sample cannot be shared.
        """
        if self.count == 1:
            return statistics, samples
        added = statistics.all_reduce(device=PartialState().device)
        if samples is None:
            return added, None
        layers = {}
        for name in added.layers:
            parts: list[Any] = [None] * self.count
            dist.all_gather_object(parts, samples.layers.get(name))
            try:
                layers[name] = LayerSample.joined([p for p in parts if p is not None], samples.max_tokens)
            except ValueError as error:
                raise ValueError(
                    f"layer {name!r} does not read every token of the text once ({error}), so several "
                    "processes cannot sample what its experts read; start one"
                ) from error
        return added, InputSamples(max_tokens=samples.max_tokens, layers=layers)


def join_processes(command: str, device: str | None) -> Processes:
    """Find the others, if torchrun or accelerate started any; all but the first fall silent.

    Args:
        command: Of moekit.
        device: As the user named it.

    Raises:
        ValueError: They do not know of each other, or were to divide the model.
    """
    check_launch(command)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Processes()
    if (sharding := asked_sharding()) is not None:
        raise ValueError(
            f"moekit {command} holds a whole model in each process, and {sharding} would divide it; start it "
            f"with torchrun --nproc_per_node {started} -m moekit.scripts.cli {command} ..."
        )
    on_cpu = device == "cpu" or torch.accelerator.current_accelerator() is None
    given: dict[str, Any] = {"backend": "gloo"} if on_cpu else {}
    state = PartialState(cpu=on_cpu, timeout=PATIENCE, **given)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started and {state.num_processes} know of each other; start them with "
            f"torchrun --nproc_per_node {started} -m moekit.scripts.cli {command} ..."
        )
    if not state.is_main_process:
        silence()
    return Processes(count=state.num_processes, rank=state.process_index)


def _nothing(layer: ExpertLayer, num_tokens: int) -> LayerSample:
    """A sample of none of so many tokens."""
    return LayerSample(
        num_tokens=num_tokens,
        starts_at=num_tokens,
        positions=torch.empty(0, dtype=torch.long),
        inputs=torch.empty(0, layer.hidden_size),
        expert_ids=torch.empty(0, layer.top_k, dtype=torch.long),
    )
