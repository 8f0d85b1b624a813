"""The file that holds routing statistics: one safetensors file, its scalars as JSON in the metadata.

A *record* is what one layer's statistics are here: field name -> value, as `LayerStatistics` takes them.
E experts, D hidden size.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE_NAME = "routing_statistics.safetensors"
FORMAT = "moekit.routing_statistics"
VERSION = 2

SCALARS = ("num_tokens", "top_k", "router_entropy_sum")
TENSORS: dict[str, tuple[torch.dtype, str]] = {
    "counts": (torch.int64, "E"),
    "routing_weight_sums": (torch.float64, "E"),
    "logit_gram": (torch.float64, "E E"),
    "coactivation": (torch.int64, "E E"),
    "output_norm_sums": (torch.float64, "E"),
    "gated_output_norm_sums": (torch.float64, "E"),
    "output_square_sums": (torch.float64, "E"),
    "output_sums": (torch.float64, "E D"),
    "max_output_norm": (torch.float64, "E"),
}
NON_NEGATIVE = {"counts", "coactivation", "output_norm_sums", "output_square_sums", "max_output_norm"}


def write_records(
    path: str | os.PathLike[str], records: Mapping[str, Mapping[str, Any]], fingerprint: Mapping[str, str]
) -> Path:
    """Writes the records of all layers; the file appears whole or not at all.

    Args:
        path: A ``.safetensors`` file, or a folder, which gets ``routing_statistics.safetensors``.
        records: By layer name, in forward order.
        fingerprint: What was recorded on what.

    Returns:
        The file written.

    Raises:
        ValueError: A number is not finite, or a count is negative; the message names the layer.
    """
    for name, record in records.items():
        _check(name, record)
    rows = [{"name": name, **{key: record[key] for key in SCALARS}} for name, record in records.items()]
    header = json.dumps({"layers": rows, "fingerprint": dict(fingerprint)}, allow_nan=False)
    tensors = {
        f"{name}.{key}": record[key].contiguous() for name, record in records.items() for key in TENSORS
    }
    file = _file(path)
    write_tensors(file, tensors, {"format": FORMAT, "version": str(VERSION), "statistics": header})
    return file


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file, whole or not at all; missing folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_records(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Reads what `write_records` wrote, and checks every number of it.

    Returns:
        The records by layer name, and the fingerprint.

    Raises:
        ValueError: There is no such file; it is truncated, of another kind or version; a tensor is missing,
            has another dtype or shape, or holds NaN, infinity or a negative count.
    """
    file = _file(path)
    if not file.is_file():
        raise ValueError(f"no routing statistics at '{file}': record them first")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            rows, fingerprint = _read_header(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        return _join(rows, tensors), fingerprint
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"'{file}' is not a whole file of routing statistics: {error}; record them again"
        ) from error


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _read_header(metadata: Mapping[str, str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is '{metadata.get('format')}', not '{FORMAT}'")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"its version is '{metadata.get('version')}', this moekit reads {VERSION}")
    header = json.loads(metadata.get("statistics", ""))
    rows, fingerprint = (
        header.get(k) if isinstance(header, dict) else None for k in ("layers", "fingerprint")
    )
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError("its metadata lists no layers")
    if not isinstance(fingerprint, dict) or not all(isinstance(value, str) for value in fingerprint.values()):
        raise ValueError("its fingerprint is not a table of strings")
    return rows, fingerprint


def _join(rows: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Puts the scalars of each layer and its tensors together."""
    records = {}
    for row in rows:
        name = str(row["name"])
        record = {key: row[key] for key in SCALARS if key in row}
        record |= {key: tensors.pop(f"{name}.{key}") for key in TENSORS if f"{name}.{key}" in tensors}
        _check(name, record)
        records[name] = record
    if tensors:
        raise ValueError(f"it holds the unknown tensor '{min(tensors)}'")
    return records


def _check(name: str, record: Mapping[str, Any]) -> None:
    """Raises ValueError unless the record holds the statistics of one layer."""
    if missing := [key for key in (*SCALARS, *TENSORS) if key not in record]:
        raise ValueError(f"layer '{name}': {missing[0]} is missing")
    for key, least in (("num_tokens", 0), ("top_k", 1)):
        if type(record[key]) is not int or record[key] < least:
            raise ValueError(f"layer '{name}': {key}={record[key]} is not a whole number from {least} up")
    if not isinstance(record["router_entropy_sum"], float) or not math.isfinite(record["router_entropy_sum"]):
        raise ValueError(
            f"layer '{name}': router_entropy_sum={record['router_entropy_sum']} is not a finite number"
        )
    if record["output_sums"].dim() != 2:
        raise ValueError(
            f"layer '{name}': output_sums has shape {list(record['output_sums'].shape)}, not [E, D]"
        )
    size = dict(zip("ED", record["output_sums"].shape, strict=True))
    for key, (dtype, axes) in TENSORS.items():
        _check_tensor(f"layer '{name}': {key}", record[key], dtype, [size[axis] for axis in axes.split()])
        if key in NON_NEGATIVE and (record[key] < 0).any():
            raise ValueError(f"layer '{name}': {key} holds a negative number")


def _check_tensor(what: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise ValueError(f"{what} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}")
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity")
