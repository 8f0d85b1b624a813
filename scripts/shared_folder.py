"""The hidden folder of a run that several processes share; one makes it, and renames what it holds."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .options import flag
from .staging import STATE_FILE, Staging, partial_folder, staged_folder


@contextmanager
def shared_folder(
    out: Path,
    settings: Mapping[str, Any],
    *,
    is_main: bool,
    wait: Callable[[], object],
    begin: Callable[[Path], object] | None = None,
    replace: bool = False,
) -> Iterator[Staging]:
    """Give all processes the same folder; every process has to enter and leave.

    Args:
        out: What is made in the end.
        settings: What the result depends on, as JSON values.
        is_main: Whether this process makes the folder and renames it.
        wait: Returns when all processes have called it.
        begin: Called by the main process with the folder of the work, before the others see it; if any.
        replace: `out` may hold something, which goes once this is whole.

    Yields:
        The folder: what becomes `out`, and the work, which a run that goes on finds again.
    """
    out = out.expanduser()
    if not is_main:
        wait()
        yield Staging(out, partial_folder(out), resumed=False)
        wait()
        return
    with staged_folder(out, settings, replace=replace) as staging:
        if begin is not None:
            begin(staging.work)
        wait()
        yield staging
        wait()


def check_unfinished(
    out: Path, settings: Mapping[str, Any], given: Mapping[str, Any], checkpoints: str
) -> None:
    """Refuse to give up the work of an unfinished run that had other settings.

    Args:
        out: What is to be made.
        settings: Of this run.
        given: Its options.
        checkpoints: Pattern of checkpoints in the folder of the work.

    Raises:
        ValueError: Names the settings, and what to do.
    """
    folder = partial_folder(out)
    try:
        earlier = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    changed = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
    # What follows from the options, such as the examples from the seed, would only hide the cause.
    changed = [key for key in changed if key in given] or changed
    if changed and any((folder / "work").glob(checkpoints)):
        names = [flag(key) if key in given else key for key in changed]
        values = [f"{earlier.get(key)!r:.80} then, {settings.get(key)!r:.80} now" for key in changed]
        shown = "; ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        raise ValueError(
            f"an unfinished run for '{out}' had other settings ({shown}); give its command again, choose "
            f"another --out, or remove '{folder}'"
        )
