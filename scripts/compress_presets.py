"""Values of `moekit compress` options that go together."""

from dataclasses import fields, replace
from typing import Any

from .options import CompressOptions

PRESETS: dict[str, dict[str, Any]] = {
    # The lowest KL of all at every size, on both models of benchmarks/compress_rivals.py.
    "best": {"method": "ean", "grouping": "sensitivity"},
}


def with_preset(options: CompressOptions) -> CompressOptions:
    """The options, with the preset's values where nothing else was said."""
    if options.preset == "none":
        return options
    defaults = {field.name: field.default for field in fields(options)}
    values = PRESETS[options.preset]
    left_open = {name: value for name, value in values.items() if getattr(options, name) == defaults[name]}
    return replace(options, **left_open)
