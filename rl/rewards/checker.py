"""A process of its own for judging answers, which can be ended when it hangs."""

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

_PROGRAM = Path(__file__).with_name("checker_process.py")
_START_SECONDS = 300.0
_PATIENCE = 20
"""So many times the processor's time is waited, because the machine may be busy, before it is given up."""


class Checker:
    """Asks `checker_process.py`, which starts at the first question and again after it had to be ended.

    Args:
        kind: Who judges.
        package: What it imports.
        seconds: Of the processor, for each answer.

    Raises:
        ValueError: The package is not installed.
    """

    def __init__(self, kind: Literal["math", "reasoning-gym"], package: str, seconds: float) -> None:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"reward {kind!r} needs the package {package}; install moekit[rl]")
        self.kind = kind
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(self, **request: Any) -> float | None:
        """Judge an answer; one that cannot be judged in time is not right, and gets 0.

        Args:
            request: JSON values, as the checker of this kind takes them.

        Returns:
            The score; ``None`` where the checker has no opinion.

        Raises:
            ValueError: The checker has failed; the message says why.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._exchange(json.dumps(request))
        if reply is None or "late" in reply:
            return 0.0
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["score"]

    def _start(self) -> None:
        # -P: the program's folder has modules that bear the names of the libraries which it imports.
        command = [sys.executable, "-P", "-W", "ignore", str(_PROGRAM), self.kind, str(self.seconds)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._replies = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        greeting = self._reply(_START_SECONDS)
        if greeting is None or "ready" not in greeting:
            self._stop()
            reason = "it did not start" if greeting is None else greeting["error"]
            raise ValueError(f"the process that judges answers for the reward {self.kind!r}: {reason}")

    def _exchange(self, line: str) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            reply = self._reply(_PATIENCE * self.seconds)
        except OSError:
            reply = None
        if reply is None:
            self._stop()
        return reply

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            return None
        return None if line is None else json.loads(line)

    def _stop(self) -> None:
        self._end()
        self._process = None


def _read(source: Iterable[str], replies: "queue.SimpleQueue[str | None]") -> None:
    with contextlib.suppress(OSError, ValueError):  # closed meanwhile
        for line in source:
            replies.put(line)
    replies.put(None)


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what the process did not read
                stream.close()
