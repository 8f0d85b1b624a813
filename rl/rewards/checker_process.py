"""A program that judges answers with libraries that can hang.

A request comes in and a reply goes out, each a line of JSON. It runs apart from the training (see
`checker.py`), because what these libraries compute, a tower of powers say, may hold the whole interpreter
and all memory for as long as it likes. It imports nothing of moekit, so that it starts in a second and
stays small.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

MEMORY_BYTES = 4 * 2**30


class _TooLateError(BaseException):
    """No Exception, because the libraries catch those."""


def math_checker() -> Callable[..., float | None]:
    """By math-verify: 1 if answers are equal as mathematics, None if the gold answer cannot be read."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # math-verify's own time-outs are signals too and would end ours.
    @lru_cache(maxsize=4096)
    def gold_of(text: str) -> list[Any]:
        has_mark = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
        boxed = text if has_mark else f"\\boxed{{{text.rpartition('####')[2].strip()}}}"
        return parse(boxed, parsing_timeout=None) or parse(text, parsing_timeout=None)  # pyright: ignore

    def check(gold: str, text: str) -> float | None:
        expected = gold_of(gold)
        if not expected:
            return None
        places = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
        found = parse(text, extraction_config=places, parsing_timeout=None)  # pyright: ignore
        return float(verify(expected, found, timeout_seconds=None))

    return check


def reasoning_gym_checker() -> Callable[..., float | None]:
    """By the scorer of the reasoning-gym data set that made the row."""
    import reasoning_gym

    scorer_of = cache(reasoning_gym.get_score_answer_fn)

    def check(dataset: str, answer: str, entry: dict[str, Any]) -> float | None:
        scorer: Any = scorer_of(dataset)
        return float(scorer(answer, entry))

    return check


CHECKERS = {"math": math_checker, "reasoning-gym": reasoning_gym_checker}


def main() -> None:
    """Serve until standard input ends."""
    kind, seconds = sys.argv[1], float(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply

    def send(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        if resource is not None:
            _limit(resource.RLIMIT_AS, MEMORY_BYTES)
            _limit(resource.RLIMIT_CORE, 0)
        check = CHECKERS[kind]()
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return
    send({"ready": True})
    for line in sys.stdin:
        try:
            send({"score": _in_time(check, json.loads(line), seconds)})
        except _TooLateError:
            send({"late": True})
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"[:500]})


def _in_time(check: Callable[..., float | None], request: dict[str, Any], seconds: float) -> float | None:
    """Within so much time of the processor: on a busy machine a right answer must not become a wrong one."""
    if resource is None:  # Windows; whoever waits ends the process
        return check(**request)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    last = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    _limit(resource.RLIMIT_CPU, last)  # ends the process, if the interpreter cannot obey the signal
    signal.signal(signal.SIGPROF, _raise_too_late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return check(**request)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _raise_too_late(*_: Any) -> None:
    raise _TooLateError


def _limit(kind: int, most: int) -> None:
    assert resource is not None
    _, allowed = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if allowed == resource.RLIM_INFINITY else min(most, allowed), allowed))


if __name__ == "__main__":
    main()
