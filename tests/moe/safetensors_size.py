"""Bytes that the tensors of a checkpoint take on disk, read from the files and not from our own code."""

from pathlib import Path


def tensor_bytes(folder: Path) -> int:
    """Sum over all shards of the file size less its header (8 bytes of length, then that many bytes)."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        total += file.stat().st_size - 8 - header
    return total
