"""Write an output folder whole or not at all, and let an interrupted run go on.

Everything is written into a hidden folder beside the target, ``.NAME.moekit-partial``, and what is finished
is renamed to the target in one step. A run that dies leaves the hidden folder, never the target; a second run
with the same settings finds there what took long, one with other settings starts anew.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
MARGIN_SHARE, MARGIN_BYTES = 1.02, 16_000_000
"""Disk space asked for beyond the tensors: headers, tokenizer, report."""


class DiskFullError(OSError):
    """The disk has too little room; says how much is needed, how much there is, and where."""


@dataclass(slots=True)
class Staging:
    """The hidden folder of a run."""

    out: Path
    """Where `output` goes in the end."""
    folder: Path
    """The hidden folder."""
    resumed: bool
    """Whether an earlier run with the same settings has left work here."""
    needed_bytes: int | None = field(default=None, init=False)
    """What `reserve` was asked for."""

    @property
    def output(self) -> Path:
        """What becomes the target; empty when a run starts."""
        return self.folder / "output"

    @property
    def work(self) -> Path:
        """What only this run and the one that resumes it need."""
        return self.folder / "work"

    def reserve(self, num_bytes: int) -> None:
        """Refuse to go on when the disk has less room than what is about to be written.

        Raises:
            DiskFullError: Too little room.
        """
        self.needed_bytes = int(num_bytes * MARGIN_SHARE) + MARGIN_BYTES
        if _free_bytes(self.folder) < self.needed_bytes:
            raise DiskFullError(_disk_full(self))

    def discard(self) -> None:
        """Remove all that was done, where nothing could go on with it."""
        for part in (self.output, self.work):
            shutil.rmtree(part, ignore_errors=True)


def check_output(out: Path, *, replace: bool = False) -> None:
    """Refuse a target that would be overwritten.

    Args:
        out: The target.
        replace: The caller has made sure that what the folder holds may go.

    Raises:
        ValueError: It is a file, a symbolic link, or a folder that is not empty.
    """
    if out.is_symlink():
        raise ValueError(f"output '{out}' is a symbolic link; give the folder that it leads to as --out")
    if out.is_dir() and any(out.iterdir()) and not replace:
        raise ValueError(f"output folder '{out}' exists and is not empty; choose another --out, or remove it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"output '{out}' is a file; --out must name a folder to make")


def partial_folder(out: Path) -> Path:
    """The hidden folder that belongs to a target."""
    out = out.absolute()
    return out.with_name(f".{out.name}.moekit-partial")


@contextmanager
def staged_folder(out: Path, fingerprint: Mapping[str, Any], *, replace: bool = False) -> Iterator[Staging]:
    """Give a hidden folder to work in, and rename its `output` to `out` if the block ends well.

    Args:
        out: The target; must not exist, or be empty.
        fingerprint: Everything that the work depends on, as JSON values; an earlier run's work is used when
            it was the same.
        replace: The target may hold something, which goes once the block has ended well.

    Yields:
        Folders to write to.

    Raises:
        ValueError: The target is not empty, or another process is at work on it.
        OSError: The folder of the target cannot be written to.
        DiskFullError: The disk ran full.
    """
    out = out.expanduser().absolute()
    check_output(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The system drops the lock with the process that holds it, however that ends.
    lock = FileLock(out.with_name(f".{out.name}.moekit-lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        _check_writable(Path(lock.lock_file))
        raise ValueError(
            f"another moekit{_holder(out)} is writing '{out}'; wait for it, or choose another --out"
        ) from error
    try:
        check_output(out, replace=replace)
        staging = _prepare(out, fingerprint)
        with _leaving_nothing_empty(staging, lock), _explaining_full_disk(staging):
            yield staging
            check_output(out, replace=replace)
            _publish(staging)
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


def _check_writable(path: Path) -> None:
    """Raise what the system has against a file; `FileLock` takes that for a lock that another holds.

    Raises:
        OSError: It cannot be made or written.
    """
    with path.open("a"):
        pass


def _prepare(out: Path, fingerprint: Mapping[str, Any]) -> Staging:
    """Take over the work of an equal run, remove that of a different one."""
    folder = partial_folder(out)
    settings = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    earlier = _read_state(folder)
    resumed = earlier.get("hash") == digest
    if folder.exists() and not resumed:
        known = earlier.get("settings", {})
        changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        logger.warning(
            "an earlier run was not finished and had other settings (%s); starting anew",
            ", ".join(changed) or "unknown",
        )
        shutil.rmtree(folder)
    staging = Staging(out, folder, resumed)
    shutil.rmtree(staging.output, ignore_errors=True)
    for needed in (staging.output, staging.work):
        needed.mkdir(parents=True, exist_ok=True)
    state = json.dumps({"hash": digest, "settings": settings, "pid": os.getpid()}, indent=1)
    temporary = folder / f"{STATE_FILE}.tmp"
    temporary.write_text(state, encoding="utf-8")
    temporary.replace(folder / STATE_FILE)
    return staging


def _publish(staging: Staging) -> None:
    """Make sure that everything is on the disk, then rename."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(staging.output.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors keeps its files from everybody else
        _sync(path)
    _sync(staging.output)
    if staging.out.is_dir():
        earlier = staging.folder / "replaced"
        shutil.rmtree(earlier, ignore_errors=True)
        staging.out.replace(earlier)
    staging.output.replace(staging.out)
    _sync(staging.out.parent)
    shutil.rmtree(staging.folder, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _leaving_nothing_empty(staging: Staging, lock: FileLock) -> Iterator[None]:
    """Remove the hidden folder of a run that failed before it had written anything."""
    try:
        yield
    except BaseException:
        if not any(path.is_file() for part in (staging.output, staging.work) for path in part.rglob("*")):
            shutil.rmtree(staging.folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
        raise


@contextmanager
def _explaining_full_disk(staging: Staging) -> Iterator[None]:
    try:
        yield
    except DiskFullError:
        raise
    # safetensors raises an error of its own for it, which only its text tells apart.
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "No space left on device" in str(error):
            raise DiskFullError(_disk_full(staging)) from error
        raise


def _disk_full(staging: Staging) -> str:
    free = _free_bytes(staging.folder)
    need = "" if staging.needed_bytes is None else f" {staging.needed_bytes:,} bytes are needed there and"
    return (
        f"the disk of '{staging.out.parent}' is full:{need} {free:,} are free; make room, or choose an --out "
        "on another disk, and give the command again"
    )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _holder(out: Path) -> str:
    pid = _read_state(partial_folder(out)).get("pid")
    return "" if pid is None else f" (process {pid})"
