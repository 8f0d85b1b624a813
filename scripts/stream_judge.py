"""Held-out text on its way through the layers of `--stream`, as they were and as they have become."""

from pathlib import Path

import torch
from torch import Tensor

from ..compress.fidelity import FidelitySums, forward_arguments
from ..moe.checkpoint import logit_difference
from ..moe.data import TokenBlocks
from ..moe.evaluating import evaluating
from ..moe.layer_stream import HiddenFiles, LayerStream
from .calibrate import model_inputs
from .checkpoint_files import weight_files
from .load import ModelSource, open_source, skeleton
from .measure import Measurements
from .verify import PROBES, check_difference, check_digests, digests

OUTSIDE = "outside"


class StreamJudge:
    """What comes out of the original and of the compressed layers, and what their heads say of it.

    Args:
        stream: Whose layers are loaded, changed and dropped.
        blocks: Held-out text.
        folder: For what flows between layers.
        batch_size: Blocks at a time.
        compares: Whether the original is judged too; else a few blocks are enough to verify the result.
    """

    def __init__(
        self, stream: LayerStream, blocks: TokenBlocks, folder: Path, batch_size: int, *, compares: bool
    ) -> None:
        self.stream = stream
        self.blocks = blocks if compares else blocks.select(range(min(PROBES, len(blocks))))
        self.batches = list(self.blocks.batches(batch_size))
        self.inputs = [model_inputs(stream.model, batch) for batch in self.batches]
        self.original = HiddenFiles(folder / "original") if compares else None
        self.compressed = HiddenFiles(folder / "compressed")
        self.folder = folder
        self.digests: dict[str, dict[str, str]] = {}
        """By part, a layer's number or `OUTSIDE`, of the tensors that are to be read back."""

    def note(self, index: int | None) -> None:
        """Remember a layer's tensors, or those outside of the layers, as they are now."""
        self.digests[_part(index)] = digests(self.stream.state_dict(index))

    def before(self, index: int) -> None:
        """Read a layer that is loaded, as it was."""
        if self.original is not None:
            self.stream.push(index, self.inputs, self.original)

    def after(self, index: int) -> None:
        """Read it as it has become."""
        self.stream.push(index, self.inputs, self.compressed)

    def forget(self, index: int) -> None:
        """Remove what a layer has read, once it is written."""
        for files in (self.original, self.compressed):
            if files is not None:
                files.forget(index)

    def measure(self) -> Measurements | None:
        """The comparison, of all that needs no generation; None if the original was not judged."""
        if self.original is None:
            return None
        model, end = self.stream.model, len(self.stream)
        sums = FidelitySums(model, model)
        for number, batch in enumerate(self.batches):
            inputs, targets_BS, counts_BS = forward_arguments(model, batch)
            both = (files.read(end, number) for files in (self.original, self.compressed))
            mine, theirs = (self.stream.logits(inputs, hidden)[:, : targets_BS.shape[1]] for hidden in both)
            sums.add(mine, theirs, targets_BS, counts_BS)
        return Measurements(fidelity=sums.report(self.blocks), generation=(), throughput=())

    def verify(self, output: Path) -> float:
        """Read the written checkpoint back, layer by layer: its tensors, and what it says of the first batch.

        The model in memory is forgotten, to have room.

        Args:
            output: Its folder.

        Returns:
            The largest difference of a logit relative to the largest logit.

        Raises:
            VerificationError: It is more than rounding, or a tensor is missing, added or changed.
        """
        expected_BSV = self.stream.logits(self.inputs[0], self.compressed.read(len(self.stream), 0))
        self.stream.drop_all()
        found_BSV = self._read_back(open_source(str(output)))
        difference = logit_difference(expected_BSV, found_BSV)
        check_difference(difference, self.stream.dtype)
        return difference

    def _read_back(self, source: ModelSource) -> Tensor:
        model = skeleton(source, self.stream.dtype)
        files = weight_files(source.folder)
        again = LayerStream(model, files, dtype=self.stream.dtype, device=self.stream.device)
        hidden = HiddenFiles(self.folder / "read back")
        with evaluating(model), torch.no_grad():
            again.load_outside()
            check_digests(self.digests[_part(None)], digests(again.state_dict(None)))
            inputs = self.inputs[:1]
            for index in range(len(again)):
                again.load(index)
                check_digests(self.digests[_part(index)], digests(again.state_dict(index)))
                again.push(index, inputs, hidden)
                again.drop(index)
                hidden.forget(index)
            return again.logits(inputs[0], hidden.read(len(again), 0))


def _part(index: int | None) -> str:
    return OUTSIDE if index is None else str(index)
