"""Look at a checkpoint's files before anything is loaded: are they there, whole, and safe to read?

Needs no torch. A `.safetensors` file starts with the length of its header (8 bytes, little-endian) and the
header, a JSON table of each tensor's place; so a few kilobytes tell how long the file must be.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, TypeGuard

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""Longest header that the format allows, bytes."""
MAX_DIMENSIONS = 64
"""Longest shape that torch takes."""
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Of an element of each type that the format knows."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no whole safetensors checkpoint.

    Raises:
        ValueError: No config, no weights, pickled weights only, or a shard that is missing, truncated or not
            a safetensors file; says which and what to do.
    """
    read_config(folder)
    if (generation := folder / "generation_config.json").is_file():
        _read_table(generation)
    for shard in weight_files(folder):
        check_shard(shard)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
        ValueError: There is none, or it is not a JSON table.
    """
    path = folder / "config.json"
    if not path.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds a PEFT adapter: merge it into its model first (`merge_and_unload`)"
        raise ValueError(f"'{folder}' has no config.json: it is not a Transformers checkpoint{hint}")
    return _read_table(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` would read.

    Raises:
        ValueError: There are none, or the index is damaged or names files that are not there.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(_no_weights(folder))
    weight_map = _read_table(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"'{index}' has no weight_map: it is damaged, download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or "\0" in name or Path(name).name != name:
            raise ValueError(
                f"'{index}' says that {tensor!r} is in {name!r}, which is not the name of a file beside it; "
                "it is damaged, download it again"
            )
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(
            f"{len(missing)} of the {len(shards)} shards of '{folder}' are missing, {missing[0]} the first; "
            "download the checkpoint again"
        )
    return shards


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if not pickled:
        return f"'{folder}' has a config.json but no weights: there is no {SINGLE_FILE} and no {INDEX_FILE}"
    return (
        f"'{folder}' holds its weights as a pickle only ({pickled[0]}), and loading a pickle runs whatever "
        f"code is in it; moekit reads safetensors alone. If you trust the file, convert it once: "
        f"model = AutoModelForCausalLM.from_pretrained('{folder}'); model.save_pretrained('{folder}')"
    )


def check_shard(path: Path) -> None:
    """Refuse a file that is shorter than its header says.

    Raises:
        ValueError: It is truncated, a Git LFS pointer, or no safetensors file.
    """
    end = LENGTH_BYTES + sum(_header_and_data_size(path))
    size = path.stat().st_size
    if size < end:
        raise ValueError(
            f"'{path}' is truncated: it has {size:,} of {end:,} bytes; download or copy it again"
        )


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's weight files, headers not counted."""
    return sum(map(data_bytes, weight_files(folder)))


def data_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    return _header_and_data_size(path)[1]


def tensor_elements(folder: Path) -> int:
    """Elements of all tensors in a folder's weight files."""
    tables = (_header(path)[1] for path in weight_files(folder))
    return sum(math.prod(entry["shape"]) for table in tables for entry in table.values())


def _header_and_data_size(path: Path) -> tuple[int, int]:
    """Length of the header and of the tensors behind it, as the header says."""
    length, table = _header(path)
    return length, max((entry["data_offsets"][1] for entry in table.values()), default=0)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length of the header and its checked entries, one for each tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        if start.startswith(b"version "[:LENGTH_BYTES]):
            raise ValueError(
                f"'{path}' is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            raise ValueError(
                f"'{path}' is not a safetensors file: its header would have {length:,} bytes; download "
                "it again"
            )
        if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise ValueError(
                f"'{path}' is truncated: it ends within its header, after {size:,} bytes; download it again"
            )
        header = file.read(length)
    try:
        table = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is not a safetensors file: its header cannot be read as JSON; download it again"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(
            f"'{path}' is not a safetensors file: its header cannot be read as a table; download it again"
        )
    table.pop("__metadata__", None)
    for name, entry in table.items():
        if fault := _fault(entry):
            raise ValueError(
                f"the header of '{path}' is damaged: tensor {name!r} has {fault}; download the file again"
            )
    return length, table


def _fault(entry: Any) -> str | None:
    """What is wrong with a tensor's entry in a header."""
    if not isinstance(entry, dict):
        return "no table of dtype, shape and data_offsets"
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"the unknown dtype {_shown(dtype)}"
    if not _are_sizes(shape):
        return f"the shape {_shown(shape)}, which is not a list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"the data_offsets {_shown(offsets)}, which are not a start and an end"
    if (length := offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        return f"the shape {_shown(shape)} of {dtype} but {length:,} bytes"
    return None


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def files_fingerprint(folder: Path) -> str:
    """Hash of the names, sizes and times of change of a folder's config, weights and tokenizer."""
    patterns = ("*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def content_fingerprint(folder: Path) -> str:
    """Hash of the content of a folder's config and weights: equal for a copy, on any machine."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"'{path}' is nested too deeply to be read; download it again") from error
    if not isinstance(table, dict):
        raise ValueError(f"'{path}' holds a {type(table).__name__}, not a JSON table")
    return table
