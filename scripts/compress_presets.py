"""Values of `moekit compress` options that go together."""

from dataclasses import replace
from typing import Any

from .options import CompressOptions

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # The lowest KL of all on both models of benchmarks/compress_rivals.py, healed as there.
    "best": {"method": "ean", "grouping": "sensitivity", "heal": "router", "heal_learning_rate": 3e-4},
}
USUAL = {"method": "m-smoe", "heal": "none"}


def with_preset(options: CompressOptions) -> CompressOptions:
    """The options, with the preset's values, or the usual ones, where nothing was said."""
    values = dict(PRESETS[options.preset])
    if options.heal not in ("auto", values.get("heal")) or options.plan_only:  # nothing of that to heal
        values = {name: value for name, value in values.items() if not name.startswith("heal")}
    if options.until_collapse_risk is not None:  # cuts every layer to the same number
        values.pop("grouping", None)
    if options.take == "rank":  # and no expert goes
        values.pop("method", None)
    if options.plan is not None:  # has settled these
        values.pop("method", None)
        values.pop("grouping", None)
    left_open = {
        name: value for name, value in (USUAL | values).items() if getattr(options, name) in ("auto", None)
    }
    return replace(options, **left_open)
