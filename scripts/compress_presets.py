"""Values of `moekit compress` options that go together."""

from dataclasses import fields, replace
from typing import Any

from .options import CompressOptions

PRESETS: dict[str, dict[str, Any]] = {
    # The lowest KL of all on both models of benchmarks/compress_rivals.py, healed as there.
    "best": {"method": "ean", "grouping": "sensitivity", "heal": "router", "heal_learning_rate": 3e-4},
}


def with_preset(options: CompressOptions) -> CompressOptions:
    """The options, with the preset's values where nothing else was said."""
    if options.preset == "none":
        return options
    defaults = {field.name: field.default for field in fields(options)}
    values = dict(PRESETS[options.preset])
    if options.heal != defaults["heal"] or options.plan_only:  # another healing, or nothing to heal
        values = {name: value for name, value in values.items() if not name.startswith("heal")}
    if options.until_collapse_risk is not None:  # cuts every layer to the same number
        values.pop("grouping")
    left_open = {name: value for name, value in values.items() if getattr(options, name) == defaults[name]}
    return replace(options, **left_open)
