"""One build of a teacher cache at a time."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no locks that some processes share and others do not get
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def one_build(
    folder: Path, begin: Callable[[], object] | None, barrier: Callable[[], object]
) -> Iterator[None]:
    """Keep other builds out of a folder until every process of this one is gone.

    Process 0 holds the lock alone while it begins, and then shares it with the others, who come here when
    they have met it at the barrier. So the next build cannot begin while any of them is at work, whichever
    ends first. The system drops the lock of a process with the process, however that ends; the file stays.
    Where there are no such locks (Windows, some network disks) nothing is kept out.

    Args:
        folder: Where the lock is.
        begin: What process 0 does before the others come; ``None`` for these.
        barrier: Where process 0 meets the others.

    Raises:
        ValueError: Another build is running there.
    """
    with (folder / LOCK_FILE).open("ab") as file:
        if begin is not None:
            _lock(file, is_shared=False)
            begin()
        _lock(file, is_shared=True)
        if begin is not None:
            barrier()
        yield


def _lock(file: IO[bytes], *, is_shared: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another build is running in '{Path(file.name).parent}'; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        logger.warning("'%s' cannot be locked (%s): do not build this cache twice at once", file.name, error)
