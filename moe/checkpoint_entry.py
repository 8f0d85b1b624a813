"""What the config of a moekit checkpoint may say of a layer."""

from typing import Any

MAX_SCALE = 1e6
"""Far above any routed_scaling_factor; a larger one in a config is damage."""


def check_entry(name: str, entry: Any) -> None:
    """Refuse what `rebuild_layer` could not carry out, or could only carry out wrongly.

    Raises:
        ValueError: Says which layer, and what is wrong.
    """
    if not isinstance(entry, dict):
        raise ValueError(
            f"layer {name!r}: {entry!r} is not an entry of num_experts, num_router_rows and router"
        )
    experts, rows, router = (entry.get(key) for key in ("num_experts", "num_router_rows", "router"))
    if not (type(experts) is int and type(rows) is int and 1 <= experts <= rows):
        raise ValueError(
            f"layer {name!r}: {experts} experts behind {rows} router rows; there must be 1 to {rows} experts"
        )
    if router not in ("full", "redirect", "logsumexp"):
        raise ValueError(f"layer {name!r}: router={router!r} is not full, redirect or logsumexp")
    if router == "full" and experts != rows:
        raise ValueError(
            f"layer {name!r}: router='full' needs one row for each of {experts} experts, not {rows}"
        )
    constants = entry.get("constants", 0)
    if type(constants) is not int or constants < 0 or (constants and router != "redirect"):
        raise ValueError(f"layer {name!r}: constants={constants!r} is not a number behind router='redirect'")
    if experts + constants > rows:
        raise ValueError(
            f"layer {name!r}: {experts} experts and {constants} constants behind {rows} router rows"
        )
    if "low_rank" in entry:
        _check_low_rank(name, entry["low_rank"])
    renormalises, scale = entry.get("renormalises"), entry.get("scale")
    finite = isinstance(scale, int | float) and abs(scale) < MAX_SCALE  # false for NaN too
    if router == "logsumexp" and not (type(renormalises) is bool and finite):
        raise ValueError(
            f"layer {name!r}: router='logsumexp' needs renormalises=true or false and a finite scale, "
            f"not {renormalises!r} and {scale!r}"
        )


def _check_low_rank(name: str, entry: Any) -> None:
    """Whether the numbers fit the matrices is seen when they are built."""
    rank, rows = (entry.get(key) if isinstance(entry, dict) else None for key in ("rank", "rows"))
    are_rows = isinstance(rows, list) and len(rows) == 2 and all(type(n) is int and n >= 0 for n in rows)
    if not (type(rank) is int and rank >= 1 and are_rows):
        raise ValueError(
            f"layer {name!r}: low_rank={entry!r} is not a rank of at least 1 and two numbers of rows"
        )
