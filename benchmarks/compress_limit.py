"""A checkpoint that does not fit into memory is compressed whole, under a limit that the kernel enforces.

    sudo python benchmarks/compress_limit.py

Linux only, and root: the processes run in a memory control group of their own (version 1 or 2), so whatever
takes more than the limit is killed. A random checkpoint of at least twice the limit is compressed with
`--stream`, and once in memory to see that the limit holds. Writes `benchmarks/results/compress_limit.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from compress_memory import MemoryConfig, command, write_checkpoint
from moekit.scripts.checkpoint_files import tensor_bytes
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """Compress under a limit."""

    limit: int = 1_200_000_000
    """Of the memory that processes and files in use may take together, bytes."""
    layers: int = 48
    results: Path = Path("benchmarks/results/compress_limit.json")


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A memory control group; processes enter it by writing their number into its `cgroup.procs`."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"moekit-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
        swap = group / ("memory.memsw.limit_in_bytes" if old else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit) if old else "0")
        yield group
    finally:
        group.rmdir()


def run(group: Path, words: list[str]) -> dict[str, Any]:
    """Run a command in the group: how it ended, and the largest resident set."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    enter = f'echo $$ > "{group / "cgroup.procs"}" && exec "$0" "$@"'
    process = subprocess.Popen(["sh", "-c", enter, sys.executable, *words], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    return {"exit": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss * 1024}


def main(config: LimitConfig) -> None:
    """Compress both ways."""
    sizes = MemoryConfig()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_checkpoint(sizes, folder / "model", config.layers)
        if size < 2 * config.limit:
            raise SystemExit(
                f"the checkpoint has {size:,} bytes, less than twice the limit of {config.limit:,}"
            )
        with limited(config.limit) as group:
            row: dict[str, Any] = {"limit": config.limit, "checkpoint": size, "layers": config.layers}
            row["in memory"] = run(group, command(sizes, folder / "model", folder / "whole"))
            row["streamed"] = run(group, command(sizes, folder / "model", folder / "parts", "--stream"))
        if row["streamed"]["exit"] == 0:
            row["written"] = tensor_bytes(folder / "parts")
            _, loading = AutoModelForCausalLM.from_pretrained(folder / "parts", output_loading_info=True)
            row["missing tensors"] = len(loading["missing_keys"])
    print(json.dumps(row, indent=1))
    config.results.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(LimitConfig))
