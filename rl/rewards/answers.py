"""What a completion says, and where in it the final answer stands."""

import re
from collections.abc import Sequence
from typing import Any, Literal

Place = Literal["auto", "boxed", "tag", "label", "whole"]
"""Where a final answer stands: in the last ``\\boxed{...}``, in the last ``<answer>...</answer>``, after
the last ``answer:`` up to the end of its line, or all that was written. ``auto`` takes the first of tag,
box and label that is there, else everything. Thoughts up to ``</think>`` never count."""

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"\banswer\b[ \t*]*:[ \t*]*([^\n]*)", re.IGNORECASE)


def completion_text(completion: str | Sequence[Any]) -> str:
    """The text of a completion, which for a chat is a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def without_thoughts(text: str) -> str:
    """What follows the last ``</think>``; everything if there is none."""
    return text.rpartition("</think>")[2]


def final_answer(text: str, place: Place = "auto") -> str | None:
    """The final answer of a completion, without spaces around it.

    Args:
        text: All that was written.
        place: See `Place`.

    Returns:
        ``None`` if nothing stands at the place.
    """
    text = without_thoughts(text)
    found: str | None = None
    if place in ("auto", "tag"):
        found = _last(_TAG.findall(text))
    if found is None and place in ("auto", "boxed"):
        found = _boxed(text)
    if found is None and place in ("auto", "label"):
        found = _last(_LABEL.findall(text))
        found = None if found is None else found.rstrip(" \t*")
    if found is None and place in ("auto", "whole"):
        found = text
    return None if found is None else found.strip()


def _last(found: Sequence[str]) -> str | None:
    return found[-1] if found else None


def _boxed(text: str) -> str | None:
    """Inside of the last box whose braces close."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth, inside = 1, start + len("\\boxed{")
        for place in range(inside, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[inside:place]
        end = start
    return None
