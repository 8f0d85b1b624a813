"""The file that holds input samples: one safetensors file, its scalars as JSON in the metadata.

A *record* is what one layer's sample is here: field name -> value, as `LayerSample` takes them.
"""

# T sampled tokens, D hidden (model) width, K active experts

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .statistics_file import write_tensors

FORMAT = "moekit.input_samples"
VERSION = 1

TENSORS = ("positions", "inputs", "expert_ids")
SCALARS = ("num_tokens", "starts_at")


def write_samples(
    path: str | os.PathLike[str], max_tokens: int, records: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Writes the samples of all layers; the file appears whole or not at all.

    Args:
        path: A ``.safetensors`` file.
        max_tokens: Most tokens of a layer.
        records: By layer name, in forward order.

    Raises:
        ValueError: The path has another suffix, or a sample is not what it should be; names the layer.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"input samples are written to a .safetensors file, got '{file}'")
    for name, record in records.items():
        check_sample(name, max_tokens, record)
    rows = [{"name": name} | {key: record[key] for key in SCALARS} for name, record in records.items()]
    header = json.dumps({"max_tokens": max_tokens, "layers": rows})
    tensors = {
        f"{name}.{key}": record[key].contiguous() for name, record in records.items() for key in TENSORS
    }
    write_tensors(file, tensors, {"format": FORMAT, "version": str(VERSION), "samples": header})
    return file


def read_samples(path: str | os.PathLike[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Reads what `write_samples` wrote, and checks all of it.

    Returns:
        Most tokens of a layer, and the records by layer name.

    Raises:
        ValueError: There is no such file; it is truncated, of another kind or version; a tensor is missing or
            unknown, or is not what it should be.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there are no input samples at '{file}': record them first")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            max_tokens, rows = _read_header(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        return max_tokens, _join(max_tokens, rows, tensors)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"'{file}' is not a whole file of input samples: {error}; record them again"
        ) from error


def check_sample(name: str, max_tokens: int, record: Mapping[str, Any]) -> None:
    """Refuses what is no sample of a layer.

    Raises:
        ValueError: Something is missing, of another type or shape, out of range, NaN or infinite; names it
            and the layer.
    """
    where = f"layer '{name}'"
    if missing := [key for key in ("num_tokens", *TENSORS) if key not in record]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    positions, inputs, ids = (record[key] for key in TENSORS)
    num_tokens, starts_at = record["num_tokens"], record.get("starts_at", 0)
    if type(num_tokens) is not int or num_tokens < 1:
        raise ValueError(f"{where}: num_tokens={num_tokens} is not a whole number from 1 up")
    if type(starts_at) is not int or not 0 <= starts_at <= num_tokens:
        raise ValueError(f"{where}: starts_at={starts_at} is not a whole number from 0 to {num_tokens}")
    if positions.dtype != torch.int64 or ids.dtype != torch.int64 or not inputs.is_floating_point():
        kinds = f"{positions.dtype}, {inputs.dtype} and {ids.dtype}"
        raise ValueError(
            f"{where}: positions, inputs and expert_ids are {kinds}, not int64, floats and int64"
        )
    size = min(num_tokens - starts_at, max_tokens)
    if positions.shape != (size,) or any(t.ndim != 2 or len(t) != size for t in (inputs, ids)):
        shapes = [list(tensor.shape) for tensor in (positions, inputs, ids)]
        raise ValueError(f"{where}: positions, inputs and expert_ids have shapes {shapes}, not T={size} rows")
    is_outside = ((positions < starts_at) | (positions >= num_tokens)).any()
    if is_outside or not (positions.diff() > 0).all():
        raise ValueError(f"{where}: positions are not ascending from {starts_at} to {num_tokens - 1}")
    if (ids < -1).any():
        raise ValueError(f"{where}: expert_ids hold a number below -1")
    if not inputs.isfinite().all():
        raise ValueError(f"{where}: inputs hold NaN or infinity")


def _read_header(metadata: Mapping[str, str]) -> tuple[int, list[dict[str, Any]]]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is '{metadata.get('format')}', not '{FORMAT}'")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"its version is '{metadata.get('version')}', this moekit reads {VERSION}")
    header = json.loads(metadata.get("samples", ""))
    max_tokens, rows = (
        header.get(key) if isinstance(header, dict) else None for key in ("max_tokens", "layers")
    )
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"its max_tokens={max_tokens} is not a whole number from 1 up")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError("its metadata lists no layers")
    return max_tokens, rows


def _join(
    max_tokens: int, rows: list[dict[str, Any]], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Puts the scalars of each layer and its tensors together."""
    records = {}
    for row in rows:
        name = str(row["name"])
        found = {key: tensors.pop(f"{name}.{key}") for key in TENSORS if f"{name}.{key}" in tensors}
        scalars = {"num_tokens": row.get("num_tokens"), "starts_at": row.get("starts_at", 0)}
        records[name] = scalars | found
        check_sample(name, max_tokens, records[name])
    if tensors:
        raise ValueError(f"it holds the unknown tensor '{min(tensors)}'")
    return records
