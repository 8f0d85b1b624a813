"""Seeds without state: whatever is drawn at a place of a run is drawn from the place's own seed."""

import hashlib


def seed_of(*place: int | str) -> int:
    """A 63-bit seed of a place, such as ``(seed, "rollout", step, number)``; the same on every machine."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
