"""Build a teacher cache, shard by shard; an interrupted build goes on where it was."""

# n examples of a shard, N rows that count, V vocabulary, D hidden width, K kept tokens, C classes

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
    Layout,
    check_index,
    check_rows,
    check_shard,
    head_metadata,
    index_text,
    read_head,
    shard_metadata,
    shard_name,
)
from .teacher_cache_lock import LOCK_FILE, one_build

logger = logging.getLogger(__name__)

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
    barrier: Callable[[], object] | None = None,
    progress: Callable[[int], object] | None = None,
    wait_seconds: float = 60.0,
) -> None:
    """Compute the shards that are not there yet, and write each whole or not at all.

    Process p of n makes shards p, p + n, ... It returns when its own are there: wait for all processes before
    you open the cache. A later build may have another n, but not before all processes of this one are gone.

    Args:
        folder: New, empty, or with an unfinished cache of the same spec.
        spec: What to build.
        compute: Answers for the examples of one shard. Matrices on any device.
        head: The teacher's, for hidden states only.
        process_index: p. Process 0 also writes the index and the head.
        num_processes: n.
        barrier: Called once, returns when all processes have called it; needed for n > 1.
        progress: Called with the number of examples of each own shard once it is there.
        wait_seconds: How long a network disk may take to show the others what process 0 has written.

    Raises:
        ValueError: An argument does not fit; the folder holds another cache, or anything else; another build
            is running there; the teacher says NaN or infinity, or something of another shape or type than the
            spec or the shards before.
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index={process_index} is not between 0 and num_processes={num_processes}")
    if barrier is None and num_processes > 1:
        raise ValueError(f"num_processes={num_processes} needs a barrier, at which all processes meet")
    if (head is not None) != (spec.kind == "hidden"):
        raise ValueError(f"kind={spec.kind!r} needs {'a' if head is None else 'no'} head")
    begin, meet = None, barrier or (lambda: None)
    if process_index == 0:
        check_cache_folder(folder, spec)
        folder.mkdir(parents=True, exist_ok=True)
        begin = partial(_begin, folder, spec, head)
    else:
        meet()
        _wait_for(folder / INDEX_FILE, wait_seconds)
    with one_build(folder, begin, meet):
        check_index(folder, spec)
        if head is not None:
            _wait_for(folder / HEAD_FILE, wait_seconds)
            _check_same_head(read_head(folder, spec), head, folder)
        shards = range(process_index, spec.num_shards, num_processes)
        _remove_partials(folder, {shard_name(shard) for shard in shards})
        layout: Layout | None = None
        for shard in shards:
            layout = _ensure_shard(folder, spec, shard, compute, head, layout)
            if progress is not None:
                progress(len(spec.examples(shard)))


def check_cache_folder(folder: Path, spec: CacheSpec) -> None:
    """Refuse a folder in which a cache can be neither begun nor gone on with.

    Raises:
        ValueError: It is a file, or holds another cache, or anything else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; a teacher cache needs a folder")
    names = _names(folder)
    if names and INDEX_FILE not in names:
        raise ValueError(
            f"'{folder}' holds {names[0]} and no {INDEX_FILE}, so nobody knows of what; choose another "
            "folder, or remove this one"
        )
    if names:
        check_index(folder, spec)


def _begin(folder: Path, spec: CacheSpec, head: Head | None) -> None:
    """Write index and head, or check the index of an earlier build."""
    check_cache_folder(folder, spec)  # again: another build may have begun before this one had the lock
    _remove_partials(folder, {INDEX_FILE, HEAD_FILE})
    if not (folder / INDEX_FILE).exists():
        with _placed(folder / INDEX_FILE) as file:
            file.write_text(index_text(spec), encoding="utf-8")
    if head is None:
        return
    try:
        read_head(folder, spec)
    except ValueError:
        parts = {"weight": head.weight, "bias": head.bias}
        tensors = {name: part.detach().cpu().contiguous() for name, part in parts.items() if part is not None}
        for name, tensor in tensors.items():
            if not math.isfinite(tensor.sum(dtype=torch.float64).item()):  # without a mask of its size
                raise ValueError(f"the {name} of the teacher's head holds NaN or infinity") from None
        _save(folder / HEAD_FILE, tensors, head_metadata(spec, head, tensors))


def _names(folder: Path) -> list[str]:
    """The finished files of a folder that holds nothing but a cache."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_file = entry.is_file(follow_symlinks=False)
            if re.fullmatch(OWN_FILE, entry.name) and is_file:
                names.append(entry.name)
            elif not re.fullmatch(OWN_PARTIAL, entry.name) and not (entry.name == LOCK_FILE and is_file):
                raise ValueError(
                    f"'{folder}' holds {entry.name!r}, which is no file of a teacher cache; choose another "
                    "folder, or move it away"
                )
    return sorted(names)


def _wait_for(file: Path, seconds: float) -> None:
    """Wait until a file of process 0 can be seen."""
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            raise ValueError(
                f"process 0 has written '{file}', which this process does not see after {seconds:g} seconds; "
                "give a folder that all of them share"
            )
        time.sleep(0.05)


def _check_same_head(found: Head, head: Head, folder: Path) -> None:
    for name in ("weight", "bias"):
        there, here = getattr(found, name), getattr(head, name)
        same = there is None and here is None
        if there is not None and here is not None and there.dtype == here.dtype:
            same = torch.equal(there, here.detach().cpu())
        if not same:
            raise ValueError(f"'{folder}' holds a head of another {name}; choose another folder")
    for name in ("softcap", "scale", "num_columns"):
        there, here = getattr(found, name), getattr(head, name)
        if there != here:
            raise ValueError(
                f"'{folder}' holds a head with {name}={there}, and this one has {here}; choose another folder"
            )


def _ensure_shard(
    folder: Path,
    spec: CacheSpec,
    shard: int,
    compute: Callable[[range], CachedRows],
    head: Head | None,
    earlier: Layout | None,
) -> Layout:
    """Compute a shard unless it is there and whole; it has the layout of the earlier ones."""
    layout, tensors, examples = _found_layout(folder, spec, shard), None, spec.examples(shard)
    if layout is None:
        tensors = _checked(compute(examples), spec, examples, head)
        layout = {name: (tensors[name].dtype, tensors[name].shape[1]) for name in TENSORS[spec.kind]}
    if earlier not in (None, layout):
        raise ValueError(
            f"the teacher gave {earlier} before {shard_name(shard)} of '{folder}', and {layout} there; load "
            "it as before, or choose another folder"
        )
    if tensors is not None:
        _save(folder / shard_name(shard), tensors, shard_metadata(spec, shard, tensors))
    return layout


def _found_layout(folder: Path, spec: CacheSpec, shard: int) -> Layout | None:
    """Of a shard that is there and whole."""
    file = folder / shard_name(shard)
    if not file.exists():
        return None
    try:
        layout = check_shard(folder, spec, shard).layout
        check_rows(folder, shard)
    except ValueError as error:
        logger.warning("%s (now computed again)", error)
        return None
    return layout


def _checked(said: CachedRows, spec: CacheSpec, examples: range, head: Head | None) -> dict[str, Tensor]:
    """What is saved of an answer, on the CPU."""
    where = f"of examples {examples[0]} to {examples[-1]} the teacher"
    names = TENSORS[spec.kind]
    if sorted(said.tensors) != sorted(names):
        raise ValueError(f"{where} gave {sorted(said.tensors)}; kind={spec.kind!r} needs {sorted(names)}")
    num_rows = said.num_rows.detach().cpu().long()
    if num_rows.shape != (len(examples),) or (num_rows < 0).any():
        raise ValueError(f"{where} gave num_rows={num_rows}, not one count for each of {len(examples)}")
    offsets = torch.cat([num_rows.new_zeros(1), num_rows.cumsum(0)])
    width = None if head is None else head.weight.shape[1]
    width = spec.top_k if width is None else width
    saved = {"offsets": offsets}
    for name in names:
        tensor = said.tensors[name].detach()
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[0] != offsets[-1] or shape[1] < 1 or width not in (None, shape[1]):
            needed = f"[{int(offsets[-1])}, {'C' if width is None else width}]"
            raise ValueError(f"{where} gave {name} of shape {shape}, not {needed}")
        if tensor.is_floating_point() == (name == "ids"):
            raise ValueError(f"{where} gave {name} of type {tensor.dtype}")
        saved[name] = _stored(name, tensor, spec, offsets, examples)
    return saved


def _stored(name: str, tensor: Tensor, spec: CacheSpec, offsets: Tensor, examples: range) -> Tensor:
    """A matrix as it is saved, without NaN, infinity and impossible ids."""
    if name == "ids":
        stored = tensor.cpu().to(torch.int32)
        bad_N = ((stored < 0) | (stored != tensor.cpu())).any(dim=1)
    else:
        stored = tensor.cpu().to(STORED_DTYPES[spec.dtype] or tensor.dtype)
        bad_N = ~stored.isfinite().all(dim=1)
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        example = examples[int(torch.searchsorted(offsets, row, right=True)) - 1]
        what = "an id that no token can have" if name == "ids" else "NaN or infinity"
        raise ValueError(
            f"the teacher says {what} of example {example} ({name}); load it in another dtype "
            "(--teacher-dtype float32), or take another teacher"
        )
    return stored.contiguous()


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        with _placed(file) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write '{file}': {error}; make room, and give the command again") from error


@contextmanager
def _placed(file: Path) -> Iterator[Path]:
    """A name to write to; what is there in the end is renamed to the file, once it is on the disk.

    In a folder of its own, since safetensors first writes to some other name beside the one it is given.
    """
    with TemporaryDirectory(PARTIAL, f".{file.name}.", file.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / file.name
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors keeps its files from everybody else
        _sync(temporary)
        temporary.replace(file)
    if os.name != "nt":  # Windows cannot open folders
        _sync(file.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_partials(folder: Path, names: set[str]) -> None:
    """Remove what killed builds left of these files, each of which only one process writes."""
    for path in folder.glob(f".*{PARTIAL}"):
        found = re.fullmatch(OWN_PARTIAL, path.name)
        if found and found[1] in names and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
