"""The files of a teacher cache, and what is checked before any of them is believed.

- ``index.json``: format, version, and the `CacheSpec`; it is written first and begins the cache.
- ``head.safetensors``: the teacher's head, for hidden states.
- ``shard-00007.safetensors``: the packed rows of ``shard_examples`` examples, and ``offsets`` into them.

Each safetensors file names the spec that it belongs to, so that no file of another cache is taken for one of
this, and has a CRC-32 of its tensors, so that no damaged one is taken for a whole one. Names come from here
and never from a file.
"""

# n examples of a shard, N rows that count, V vocabulary, D hidden width, K kept tokens, C classes

import hashlib
import json
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .fused import Head
from .losses.checks import check_choice

FORMAT = "moekit.teacher-cache"
VERSION = 2

INDEX_FILE = "index.json"
HEAD_FILE = "head.safetensors"
METADATA_KEY = "teacher_cache"  # one entry only: safetensors writes several in any order
MAX_INDEX_BYTES = 2**20
MAX_WIDTH = 2**31  # a matrix without rows may claim any
MAX_SHARD_BYTES = 2**27
MAX_SHARD_EXAMPLES = 512
"""What a killed build has to compute again at most."""

TENSORS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden",),
    "top-k": ("log_probs", "ids"),
    "logits": ("logits",),
}
"""What a shard holds beside its offsets, by kind: matrices of one row for each row that counts."""

STORED_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""By their names in a file."""

Layout = dict[str, tuple[torch.dtype, int]]
"""Type and width of each matrix, the same in all shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """What a cache holds, and of what.

    Raises:
        ValueError: An entry out of its range.
    """

    kind: str
    """``hidden``: last hidden states and the head, exact for every loss. ``top-k``: log-probabilities and ids
    of the likeliest tokens. ``logits``: a classifier's."""
    num_examples: int
    source: Mapping[str, str]
    """Fingerprints of all that the answers depend on: model, tokenizer, data, ..."""
    top_k: int | None = None
    """Tokens kept of each row, for ``top-k`` only."""
    dtype: str = "auto"
    """Of the stored floats: ``bfloat16``, ``float32``, or ``auto`` for the teacher's own."""
    shard_examples: int = MAX_SHARD_EXAMPLES
    """Examples of a shard, which is made in memory; the last may have fewer. See `examples_per_shard`."""

    def __post_init__(self) -> None:
        """Check everything."""
        check_choice("kind", self.kind, tuple(TENSORS))
        check_choice("dtype", self.dtype, tuple(STORED_DTYPES))
        for name in ("num_examples", "shard_examples") + (("top_k",) if self.kind == "top-k" else ()):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number from 1 up")
        if self.kind != "top-k" and self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} needs kind='top-k', not {self.kind!r}; leave it out")
        if not all(isinstance(text, str) for pair in self.source.items() for text in pair):
            raise ValueError(f"source={reprlib.repr(dict(self.source))} is not a table of strings")

    @property
    def num_shards(self) -> int:
        """Of the whole cache."""
        return -(-self.num_examples // self.shard_examples)

    @property
    def record(self) -> dict[str, Any]:
        """As the index holds it."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**entries, "source": dict(self.source)}

    @property
    def digest(self) -> str:
        """SHA-256 of everything."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    def examples(self, shard: int) -> range:
        """The examples of one shard."""
        first = shard * self.shard_examples
        return range(first, min(first + self.shard_examples, self.num_examples))


@dataclass(frozen=True, slots=True, eq=False)
class CachedRows:
    """What the teacher says of some examples."""

    num_rows: Int[Tensor, " B"]
    """Rows of each example, int64; 0 is allowed."""
    tensors: dict[str, Tensor]
    """The rows of all examples, one after the other: ``hidden`` ``[N, D]``, or ``log_probs`` and ``ids``
    ``[N, K]``, or ``logits`` ``[N, C]``."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What is known of a shard without reading its rows."""

    offsets: Int[Tensor, " n_plus_1"]
    """Where the rows of each example begin, and where the last end."""
    layout: Layout
    num_bytes: int


def examples_per_shard(example_bytes: int) -> int:
    """As many examples as stay within `MAX_SHARD_BYTES` and `MAX_SHARD_EXAMPLES`; at least one.

    Args:
        example_bytes: The most that the rows of one example can take.
    """
    return max(1, min(MAX_SHARD_EXAMPLES, MAX_SHARD_BYTES // example_bytes))


def shard_name(shard: int) -> str:
    """The name of a shard's file."""
    return f"shard-{shard:05d}.safetensors"


def shard_metadata(spec: CacheSpec, shard: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a shard says of itself."""
    return _metadata({"spec": spec.digest, "shard": shard}, tensors)


def head_metadata(spec: CacheSpec, head: Head, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the file of the head says beside its tensors."""
    softcap = None if head.softcap is None else float(head.softcap)
    scalars = {"softcap": softcap, "scale": float(head.scale), "num_columns": head.num_columns}
    return _metadata({"spec": spec.digest, **scalars}, tensors)


def _metadata(entries: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    facts = {"format": FORMAT, "version": VERSION, **entries, "checksum": checksum(tensors)}
    return {METADATA_KEY: json.dumps(facts)}


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of contiguous tensors on the CPU, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, value)
    return value


def index_text(spec: CacheSpec) -> str:
    """What ``index.json`` holds."""
    return json.dumps({"format": FORMAT, "version": VERSION, "spec": spec.record}, indent=1) + "\n"


def check_index(folder: Path, spec: CacheSpec) -> None:
    """Refuse a folder that does not hold the cache of this spec.

    Raises:
        ValueError: There is none; its index is damaged, of another format or version; or the spec differs,
            and the message says where.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise ValueError(f"there is no teacher cache in '{folder}': it has no {INDEX_FILE}; build it first")
    try:
        _check_plain(file)
        with file.open("rb") as opened:
            text = opened.read(MAX_INDEX_BYTES + 1)
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {MAX_INDEX_BYTES} bytes; a source holds fingerprints only")
        index = _parse(text)
        there = index.get("spec")
        if not isinstance(there, dict) or not isinstance(there.get("source"), dict):
            raise ValueError("it holds no spec with a source")
    except (OSError, ValueError) as error:
        raise ValueError(f"'{file}' cannot be used: {error}; choose another folder") from error
    if differences := _differences(_flat(there), _flat(spec.record)):
        raise ValueError(
            f"'{folder}' holds another teacher cache than the one asked for: {'; '.join(differences)}; "
            "choose another folder, or remove this one"
        )


def check_shard(folder: Path, spec: CacheSpec, shard: int) -> Shard:
    """Read a shard's header and offsets, and check that they fit each other, the file and the spec.

    The rows are not read; see `check_rows`.

    Raises:
        ValueError: The file is missing, truncated or damaged, or belongs to another cache.
    """
    file = folder / shard_name(shard)
    num_examples = len(spec.examples(shard))
    with _opened(file) as opened:
        header = _header(opened)
        if (header.get("spec"), header.get("shard")) != (spec.digest, shard):
            raise ValueError("it is not this shard of this cache")
        names = TENSORS[spec.kind]
        _check_names(opened, {*names, "offsets"})
        offsets = opened.get_slice("offsets")
        if offsets.get_dtype() != "I64" or offsets.get_shape() != [num_examples + 1]:
            raise ValueError(f"its offsets are no {num_examples + 1} numbers of 64 bits")
        offsets = opened.get_tensor("offsets").clone()
        # Not by differences, which can overflow.
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            raise ValueError("its offsets do not rise from 0")
        layout = {name: _check_matrix(opened, name, int(offsets[-1]), spec) for name in names}
        return Shard(offsets, layout, file.stat().st_size)


def check_rows(folder: Path, shard: int) -> None:
    """Compare a shard's tensors with the checksum that was written with them.

    Reads the whole shard (`examples_per_shard` bounds it), about a gigabyte in a second from memory, and
    keeps nothing of it.

    Raises:
        ValueError: They differ.
    """
    with _opened(folder / shard_name(shard)) as opened:
        _check_sum(_header(opened), {name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118


def _check_sum(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if header.get("checksum") != checksum(tensors):
        raise ValueError("its checksum is wrong: it does not hold what was written")


def _check_matrix(opened: Any, name: str, num_rows: int, spec: CacheSpec) -> tuple[torch.dtype, int]:
    """Type and width of a matrix that fits."""
    matrix = opened.get_slice(name)
    dtype, shape = matrix.get_dtype(), matrix.get_shape()
    stored = STORED_DTYPES[spec.dtype]
    allowed = {key: kind for key, kind in FLOATS.items() if stored in (None, kind)}
    if name == "ids":
        allowed = {"I32": torch.int32}
    if dtype not in allowed:
        raise ValueError(f"its {name} are {dtype}, not {' or '.join(allowed)}")
    if len(shape) != 2 or shape[0] != num_rows or not 1 <= shape[1] < MAX_WIDTH:
        raise ValueError(f"its {name} have shape {shape}; its offsets need {num_rows} rows")
    if spec.top_k not in (None, shape[1]):
        raise ValueError(f"its {name} have {shape[1]} columns, not top_k={spec.top_k}")
    return allowed[dtype], shape[1]


def read_head(folder: Path, spec: CacheSpec) -> Head:
    """Read the teacher's head; its tensors map the file.

    Raises:
        ValueError: It is missing, damaged, or belongs to another cache.
    """
    with _opened(folder / HEAD_FILE) as opened:
        header = _header(opened)
        if header.get("spec") != spec.digest:
            raise ValueError("it is not the head of this cache")
        softcap, scale, num_columns = (header.get(key) for key in ("softcap", "scale", "num_columns"))
        if type(scale) is not float or not (softcap is None or type(softcap) is float):
            raise ValueError("softcap or scale is no number")
        if not (num_columns is None or type(num_columns) is int):
            raise ValueError("num_columns is no whole number")
        has_bias = "bias" in opened.keys()  # noqa: SIM118 (not a dict)
        _check_names(opened, {"weight", "bias"} if has_bias else {"weight"})
        for name in opened.keys():  # noqa: SIM118
            if opened.get_slice(name).get_dtype() not in FLOATS:
                raise ValueError(f"its {name} is not made of floating-point numbers")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        _check_sum(header, tensors)
        bias = tensors.get("bias")
        return Head(
            weight=tensors["weight"], bias=bias, softcap=softcap, scale=scale, num_columns=num_columns
        )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it becomes one kind of error that names it."""
    try:
        if not file.exists():
            raise ValueError("it is missing")
        _check_plain(file)
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"'{file}' is no whole part of a teacher cache: {error}; remove it and give the same command "
            "again to build it anew, or choose another folder"
        ) from error


def _check_plain(file: Path) -> None:
    if file.is_symlink() or not file.is_file():
        raise ValueError("it is a link, or no file; nothing outside the folder is read")


def _header(opened: Any) -> dict[str, Any]:
    """What a file says of itself."""
    metadata = opened.metadata() or {}
    if METADATA_KEY not in metadata:
        raise ValueError("it does not say to which cache it belongs")
    return _parse(metadata[METADATA_KEY])


def _check_names(opened: Any, expected: set[str]) -> None:
    if set(opened.keys()) != expected:
        raise ValueError(f"it holds {reprlib.repr(sorted(opened.keys()))}, not {sorted(expected)}")


def _parse(text: str | bytes) -> dict[str, Any]:
    """An object of JSON that says it is of this format and version."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of the format '{FORMAT}'")
    version = found.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"its version is {reprlib.repr(version)}; this moekit reads {VERSION}")
    return found


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The entries of the source beside the others."""
    rest = {key: value for key, value in record.items() if key != "source"}
    return rest | {f"source {key}": value for key, value in record["source"].items()}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{reprlib.repr(key)} is {reprlib.repr(there.get(key))} there, {reprlib.repr(here.get(key))} here"
        for key in sorted({*there, *here})
        if type(there.get(key)) is not type(here.get(key)) or there.get(key) != here.get(key)
    ]
