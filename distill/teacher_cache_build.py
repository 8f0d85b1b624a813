"""Build a teacher cache, shard by shard; an interrupted build goes on where it was."""

# n examples of a shard, N rows that count, V vocabulary, D hidden width, K kept tokens, C classes

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .fused import Head
from .teacher_cache_format import (
    HEAD_FILE,
    INDEX_FILE,
    STORED_DTYPES,
    TENSORS,
    CachedRows,
    CacheSpec,
    check_index,
    check_shard,
    head_metadata,
    index_text,
    read_head,
    shard_metadata,
    shard_name,
)

PARTIAL = ".partial"
OWN_FILE = r"(index\.json|head\.safetensors|shard-\d{5,}\.safetensors)"
OWN_PARTIAL = rf"\.{OWN_FILE}\.\w+\.partial"


def build_cache(
    folder: str | os.PathLike[str],
    spec: CacheSpec,
    compute: Callable[[range], CachedRows],
    *,
    head: Head | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    progress: Callable[[int], None] | None = None,
    wait_seconds: float = 600.0,
) -> None:
    """Compute the shards that are not there yet, and write each whole or not at all.

    Process p of n makes shards p, p + n, ... It returns when its own are there: wait for all processes before
    you open the cache. A later build may have another n.

    Args:
        folder: New, empty, or with an unfinished cache of the same spec.
        spec: What to build.
        compute: Answers for the examples of one shard. Matrices on any device.
        head: The teacher's, for hidden states only.
        process_index: p. Process 0 also writes the index and the head.
        num_processes: n.
        progress: Called with the number of examples of each own shard once it is there.
        wait_seconds: How long the others wait for process 0 to begin.

    Raises:
        ValueError: An argument does not fit; the folder holds another cache, or anything else; the teacher
            says NaN or infinity, or something of another shape or type than the spec or the shards before.
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index={process_index} is not between 0 and num_processes={num_processes}")
    if (head is not None) != (spec.kind == "hidden"):
        raise ValueError(f"kind={spec.kind!r} needs {'a' if head is None else 'no'} head")
    shards = range(process_index, spec.num_shards, num_processes)
    if process_index == 0:
        _begin(folder, spec, head)
    else:
        _wait_for(folder / INDEX_FILE, wait_seconds)
        check_index(folder, spec)
        if head is not None:
            _wait_for(folder / HEAD_FILE, wait_seconds)
    if head is not None:
        _check_same_head(read_head(folder, spec), head, folder)
    _remove_partials(folder, {shard_name(shard) for shard in shards})
    layout = None
    for shard in shards:
        try:
            found = check_shard(folder, spec, shard).layout
        except ValueError:
            tensors = _checked(compute(spec.examples(shard)), spec, spec.examples(shard), head)
            found = _make_shard(folder, spec, shard, tensors, layout)
        layout = layout or found
        if progress is not None:
            progress(len(spec.examples(shard)))
