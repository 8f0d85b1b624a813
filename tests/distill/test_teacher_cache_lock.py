"""Only one build of a cache is at work at a time, and a killed one is in nobody's way."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from moekit.distill import teacher_cache_lock
from moekit.distill.teacher_cache import CachedRows

from .teacher_caches import Teacher, build, contents, say

fcntl = pytest.importorskip("fcntl")

RUNNING = "another build is running in '.*'; wait for it, or choose another folder"
HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "ab") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    print("locked", flush=True)
    time.sleep(600)
"""


def doing_before(deed: Callable[[], object]) -> Callable[[range], CachedRows]:
    """A teacher that does something while it is asked."""

    def compute(examples: range) -> CachedRows:
        deed()
        return say("logits", examples)

    return compute


def test_a_second_build_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "cache"
    build(whole, "logits")
    partial = folder / ".shard-00000.safetensors.x1_y.partial"

    def intrude() -> None:
        partial.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=RUNNING):
            build(folder, "logits")
        assert partial.exists()

    build(folder, "logits", doing_before(intrude))
    teacher = Teacher("logits")
    build(folder, "logits", teacher)
    assert teacher.asked == []
    assert contents(folder) == contents(whole)


def test_the_last_process_of_a_build_still_keeps_others_out(tmp_path: Path) -> None:
    group: dict[str, Any] = {"num_processes": 2, "barrier": Barrier(2, timeout=60).wait}
    is_at_work, may_go_on = Event(), Event()

    def wait() -> None:
        is_at_work.set()
        assert may_go_on.wait(60)

    with ThreadPoolExecutor() as pool:
        second = pool.submit(build, tmp_path, "logits", doing_before(wait), process_index=1, **group)
        build(tmp_path, "logits", process_index=0, **group)  # has made its own shards and is gone
        try:
            assert is_at_work.wait(60)
            with pytest.raises(ValueError, match=RUNNING):
                build(tmp_path, "logits")
        finally:
            may_go_on.set()
        second.result()
    build(tmp_path, "logits", Teacher("logits", dies_at=0))


def test_a_killed_build_keeps_nobody_out(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=RUNNING):
            build(tmp_path, "logits")
        assert contents(tmp_path) == {".lock": b""}
        other.kill()
    build(tmp_path, "logits")


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    folder, target = tmp_path / "cache", tmp_path / "target"
    folder.mkdir()
    (folder / ".lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"holds '\.lock', which is no file of a teacher cache"):
        build(folder, "logits")
    assert not target.exists()


def test_disks_and_systems_without_locks(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    build(tmp_path / "disk", "logits")
    assert "cannot be locked (no locks available): do not build this cache twice at once" in caplog.text
    monkeypatch.setattr(teacher_cache_lock, "fcntl", None)
    build(tmp_path / "system", "logits")
    assert contents(tmp_path / "disk") == contents(tmp_path / "system")
