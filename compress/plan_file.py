"""Read and write JSON that people edit: laid out to be read, and read so that no slip goes unseen.

Every key must be known and every value of its field's type; NaN, infinity and repeated keys, which Python's
parser lets through, are refused. Knows nothing of what a plan means.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

WIDTH = 110


def parse_json(text: str) -> Any:
    """Parse JSON without Python's leniences.

    Raises:
        ValueError: Not JSON, NaN or Infinity, a key twice in one table, nested too deeply, a number of too
            many digits, or half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        # JSON can spell what no file can hold; it would only be noticed when the plan is saved again.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(
            f"it holds {error.object[error.start]!r}, half of a character's surrogate pair"
        ) from error
    return value


def format_json(value: Any, indent: int = 0) -> str:
    """Lay out JSON for reading: whatever fits on a line, and every list of plain values, stays on one.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    branches = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    )
    if not branches or indent + len(line) <= WIDTH:
        return line
    inner, pad = indent + 1, " " * (indent + 1)
    if isinstance(value, dict):
        rows = [f"{json.dumps(key, ensure_ascii=False)}: {format_json(v, inner)}" for key, v in value.items()]
    else:
        rows = [format_json(item, inner) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{pad}" + f",\n{pad}".join(rows) + f"\n{' ' * indent}{end}"


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write a whole file or none: to a temporary name beside it, then renamed. Missing folders are made."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def read_record(record_type: type[Record], data: Any, where: str) -> Record:
    """Build a dataclass from parsed JSON.

    Fields may be str, int, float, None, dataclasses, ``dict[str, Any]`` of plain values, tuples of any of
    these, and unions with None.

    Args:
        record_type: The dataclass.
        data: What `parse_json` gave.
        where: What messages call this table.

    Raises:
        ValueError: An unknown or missing key, or a value of another type; names it and says what is allowed.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {_shown(data)}, not a table")
    known = {field.name: field for field in fields(record_type)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(data.keys() - known.keys()):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(known)}")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"{where} lacks the key {missing[0]!r}")
    hints = get_type_hints(record_type)
    return record_type(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, UnionType) and any(map(is_dataclass, get_args(hint))):
        return None if value is None else _read(next(filter(is_dataclass, get_args(hint))), value, where)
    if is_dataclass(hint):
        return read_record(hint, value, where)  # pyright: ignore[reportArgumentType]
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {_shown(value)}, not a list")
        return tuple(_read(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is dict:
        return _read_settings(value, where)
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    # JSON writes 1.0 as 1, and Python counts True as an int.
    if float in allowed and type(value) is int:
        try:
            value = float(value)
        except OverflowError as error:
            raise ValueError(f"{where} is {_shown(value)}, larger than any float") from error
    if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
        names = " or ".join(_NAMES[kind] for kind in allowed)
        raise ValueError(f"{where} is {_shown(value)}, not {names}")
    return value


def _read_settings(value: Any, where: str) -> dict[str, Any]:
    """A table of plain values and lists of them."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}, not a table")
    for key, entry in value.items():
        for item in entry if isinstance(entry, list) else [entry]:
            plain = isinstance(item, str | int | float | NoneType)
            if not plain or (isinstance(item, float) and not math.isfinite(item)):
                raise ValueError(f"{where}.{key} is {_shown(item)}, not a text, a finite number or null")
    return value


_NAMES: Mapping[Any, str] = {str: "a text", int: "a whole number", float: "a finite number", NoneType: "null"}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}; only finite numbers are allowed")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"it holds the key {next(k for k in keys if keys.count(k) > 1)!r} twice in one table"
        )
    return table
