"""Calls of functions that others wrote: a function that hangs costs its time-out, not the run."""

import asyncio
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from typing import Any, Literal

import torch

_GRACE_SECONDS = 1.0
"""An async function has this long to obey its cancellation."""


class CallError(Exception):
    """A function gave no result.

    Attributes:
        kind: What it did.
    """

    def __init__(self, kind: Literal["raised", "hung"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TimedCalls:
    """Calls functions, each in a thread of its own, and waits for them only so long.

    A Python thread cannot be ended from outside: a call that hangs is left behind, with whatever it holds.
    Async functions run together on one event loop and are cancelled. Code that keeps the interpreter to
    itself (a power of huge integers, say) cannot be timed from the same process at all; see
    `checker.Checker` for that.

    Args:
        timeout_seconds: Of each call; ``inf`` calls plain functions directly, in the caller's thread.
        max_hung: So many calls may hang at once.
    """

    def __init__(self, timeout_seconds: float, max_hung: int) -> None:
        self.timeout_seconds = timeout_seconds
        self.max_hung = max_hung
        self._hung: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None

    def start(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
        """Begin a call with keyword arguments.

        Returns:
            Waits for the result. It raises `CallError`, or ValueError if too many calls hang.
        """
        if is_async(function):
            return self._start_async(function, arguments)
        if math.isinf(self.timeout_seconds):
            return lambda: _directly(function, arguments)
        future: Future[Any] = Future()
        body = _run_on_same_device(future, function, arguments)
        thread = threading.Thread(target=body, daemon=True, name="reward")
        thread.start()
        return lambda: self._wait(future, thread, self.timeout_seconds)

    def _start_async(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(
                target=_run_loop, args=(self._loop,), daemon=True, name="rewards"
            )
            self._loop_thread.start()
            weakref.finalize(self, _stop_loop, self._loop)
        loop, thread = self._loop, self._loop_thread
        assert thread is not None
        limit = None if math.isinf(self.timeout_seconds) else self.timeout_seconds

        async def bounded() -> Any:
            return await asyncio.wait_for(function(**arguments), limit)

        future = asyncio.run_coroutine_threadsafe(bounded(), loop)

        def result() -> Any:
            try:
                return self._wait(future, thread, None if limit is None else limit + _GRACE_SECONDS)
            except CallError as error:
                if not future.done() and self._loop is loop:
                    self._loop = None  # something blocks it; the next call gets another
                if isinstance(error.__cause__, TimeoutError):
                    raise CallError("hung", self._late) from None
                raise

        return result

    @property
    def _late(self) -> str:
        return f"no result after {self.timeout_seconds:g} s"

    def _wait(self, future: "Future[Any]", thread: threading.Thread, seconds: float | None) -> Any:
        try:
            error = future.exception(seconds)
        except TimeoutError:
            self._leave_behind(thread)
            raise CallError("hung", self._late) from None
        except CancelledError:
            raise CallError("raised", "it was cancelled") from None
        if error is not None:
            raise CallError("raised", f"{type(error).__name__}: {error}") from error
        return future.result()

    def _leave_behind(self, thread: threading.Thread) -> None:
        self._hung = list({*(t for t in self._hung if t.is_alive()), thread})
        if len(self._hung) > self.max_hung:
            raise ValueError(
                f"{len(self._hung)} calls of reward functions hang, each for more than "
                f"{self.timeout_seconds:g} s, and cannot be ended; give what they wait for a time-out of "
                "its own, or raise timeout_seconds"
            )


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def _directly(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        raise CallError("raised", f"{type(error).__name__}: {error}") from error


def _run_on_same_device(
    future: "Future[Any]", function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[], None]:
    """The body of a thread; CUDA's current device is each thread's own."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            with nullcontext() if device is None else torch.cuda.device(device):
                future.set_result(function(**arguments))
        except BaseException as error:  # SystemExit too: nobody else would hear of it
            future.set_exception(error)

    return run


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop_loop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
