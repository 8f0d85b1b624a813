"""How a process of the command ends that works together with others."""

import atexit
import os
import sys
from typing import NoReturn


def works_together() -> bool:
    """Whether a job of this process has joined it with others; needs no torch where none was loaded."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave_together(code: int) -> NoReturn:
    """End this process, once all have done their work where it went well.

    The interpreter is not taken apart: torch keeps what has been sharded in caches of its own, and with it
    the group's threads, which `destroy_process_group` does not end. One that is at work when the interpreter
    goes aborts the process, and the launcher calls the whole run failed.

    Args:
        code: Of the exit; unless it is 0 the others are not waited for, who may never come.
    """
    if code == 0:
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
    atexit._run_exitfuncs()  # trackers finish their runs here
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
