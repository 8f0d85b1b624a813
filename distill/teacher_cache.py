"""What a teacher says of every example of a data set, kept on the disk.

    spec = CacheSpec(kind="hidden", num_examples=len(data), source={"model": ..., "data": ...})
    build_cache(folder, spec, compute, head=head)  # after an interruption again: only the rest is computed
    rows = TeacherCache.open(folder, spec).read(batch["row"])

One teacher then serves many runs, and need not fit into memory beside the student.
"""

# B examples, N rows that count, D hidden width, K kept tokens, C classes

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from .fused import Head
from .teacher_cache_build import build_cache
from .teacher_cache_format import (
    HEAD_FILE,
    CachedRows,
    CacheSpec,
    Shard,
    check_index,
    check_rows,
    check_shard,
    read_head,
    shard_name,
)

__all__ = ["CacheSpec", "CachedRows", "TeacherCache", "build_cache"]

MAX_OPEN_SHARDS = 512
"""Opening a shard takes longer than reading an example; an open one holds neither memory nor a handle."""


class TeacherCache:
    """A whole cache, opened by `open`. It may be forked, or sent to another process.

    Attributes:
        head: The teacher's, for hidden states; its tensors map the file.
        num_bytes: Of shards and head, on the disk.
    """

    def __init__(self, folder: Path, spec: CacheSpec, shards: list[Shard], head: Head | None) -> None:
        self.folder, self.spec, self.head = folder, spec, head
        self.num_bytes = sum(shard.num_bytes for shard in shards)
        if head is not None:
            self.num_bytes += (folder / HEAD_FILE).stat().st_size
        self._offsets = [shard.offsets for shard in shards]
        self._layout = shards[0].layout
        self._handles: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        self._process = os.getpid()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], spec: CacheSpec) -> "TeacherCache":
        """Check the cache of a folder: the head, and every header against its file, its offsets and the spec.

        Args:
            folder: What `build_cache` filled.
            spec: What it was built with.

        Raises:
            ValueError: There is no cache; it is of another spec, and the message says where they differ; or a
                shard is missing or damaged, and the message says how to go on.
        """
        folder = Path(folder)
        check_index(folder, spec)
        missing = [shard for shard in range(spec.num_shards) if not (folder / shard_name(shard)).exists()]
        if missing:
            raise ValueError(
                f"the teacher cache '{folder}' lacks {len(missing)} of {spec.num_shards} shards, the first "
                f"is {shard_name(missing[0])}; give the same command again to build the rest"
            )
        head = read_head(folder, spec) if spec.kind == "hidden" else None
        shards = [check_shard(folder, spec, shard) for shard in range(spec.num_shards)]
        layouts = [shard.layout for shard in shards]
        for number, layout in enumerate(layouts):
            if layout != layouts[0]:
                raise ValueError(
                    f"{shard_name(number)} of the teacher cache '{folder}' holds {layout} and "
                    f"{shard_name(0)} {layouts[0]}: two teachers made them; remove the folder"
                )
        if head is not None and layouts[0]["hidden"][1] != head.weight.shape[1]:
            raise ValueError(
                f"the hidden states of the teacher cache '{folder}' are {layouts[0]['hidden'][1]} wide and "
                f"its head reads {head.weight.shape[1]}: two teachers made them; remove the folder"
            )
        return cls(folder, spec, shards, head)

    def read(self, examples: Int[Tensor, " B"]) -> CachedRows:
        """Read the rows of some examples, in their order; only these come into memory.

        The first time that a shard is needed it is read whole, to compare it with its checksum
        (`check_rows`). All together that costs each process one reading of the cache, from the disk or from
        what the system keeps of it in memory.

        Args:
            examples: Numbers of examples, in any order and also twice.

        Raises:
            ValueError: There is no such example, or its shard does not hold what was written.
        """
        numbers = examples.tolist()
        if wrong := [number for number in numbers if not 0 <= number < self.spec.num_examples]:
            raise ValueError(
                f"example {wrong[0]} is not in the teacher cache, which holds 0 to "
                f"{self.spec.num_examples - 1}"
            )
        spots = [self._spot(number) for number in numbers]
        num_rows = torch.tensor([last - first for _, first, last in spots], dtype=torch.int64)
        total = int(num_rows.sum())
        tensors = {
            name: torch.empty(total, width, dtype=dtype) for name, (dtype, width) in self._layout.items()
        }
        row = 0
        for shard, first, last in spots:
            if last > first:
                for name, tensor in tensors.items():
                    tensor[row : row + last - first] = self._handle(shard).get_slice(name)[first:last]
            row += last - first
        return CachedRows(num_rows, tensors)

    def _spot(self, example: int) -> tuple[int, int, int]:
        """Shard, first row and end of an example."""
        shard, place = divmod(example, self.spec.shard_examples)
        first, last = self._offsets[shard][place : place + 2].tolist()
        return shard, first, last

    def _handle(self, shard: int) -> Any:
        """An open shard; those used longest ago are closed."""
        if self._process != os.getpid():  # forked: the parent's handles stay the parent's
            self._handles, self._process = OrderedDict(), os.getpid()
        if shard not in self._handles:
            if shard not in self._checked:
                check_rows(self.folder, shard)
                self._checked.add(shard)
            file = self.folder / shard_name(shard)
            self._handles[shard] = safe_open(file, framework="pt", device="cpu")
            if len(self._handles) > MAX_OPEN_SHARDS:
                self._handles.popitem(last=False)
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}
