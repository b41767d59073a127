"""Processes that a test forks, and that it may kill.

Example::

    child = begin(lambda: work())
    if not ended(child, seconds):
        os.kill(child, signal.SIGKILL)
    assert end_of(child) in (0, -signal.SIGKILL)
"""

from __future__ import annotations

import os
import select
import signal
import traceback
from collections.abc import Callable

import pytest

LONG = 120.0
"""Seconds after which a process that hangs fails the test."""


def begin(action: Callable[[], int]) -> int:
    """Run ``action`` in a new process, which exits with its result; return the process id."""
    # A signal that comes before the child is inside ``try`` would end the tests themselves in it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return child
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = action()
    except KeyboardInterrupt:
        # The signal may come before the command has installed its handler.
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(child: int, seconds: float = LONG) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    if not ended(child, seconds):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail(f"a process did not end within {seconds:.0f} seconds")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child: int, seconds: float) -> bool:
    """Return whether a process ends within so many seconds."""
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
