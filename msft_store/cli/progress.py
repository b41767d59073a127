"""How far a transfer is, for a person at a terminal, and how to leave one at once.

Example::

    with line(wanted=not options.json) as progress:
        push(store, url, progress=progress)
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from msft_store._util import format_bytes

_T = TypeVar("_T")
_EVERY = 0.2
"""Seconds between two looks of the line."""
_ERASE = "\r\x1b[K"
MESSAGE = "msft-store: interrupted; nothing is half done, and the same command goes on"
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


@contextlib.contextmanager
def line(*, wanted: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Give what shows steps in one line on stderr; ``None`` where no terminal reads it."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    shown = _Line()
    try:
        yield shown.tell
    finally:
        shown.erase()


class _Line:
    def __init__(self) -> None:
        self._step = ""
        self._begun = self._last = 0.0
        self._ended = False

    def tell(self, step: str, done: int, total: int) -> None:
        """Show a step, its bytes so far and all of them, and how fast they go."""
        now = time.monotonic()
        if step != self._step:
            self._step, self._begun = step, now
        elif self._ended or (now - self._last < _EVERY and done != total):
            return
        self._last = now
        text = step
        if total:
            speed = (
                f", {format_bytes(int(done / (now - self._begun)))}/s" if now > self._begun else ""
            )
            text += f" {format_bytes(done)} of {format_bytes(total)}{speed}"
        print(f"{_ERASE}{text}", end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        """Leave nothing behind."""
        self._ended = True
        print(_ERASE, end="", file=sys.stderr, flush=True)


def interruptible(act: Callable[[], _T]) -> _T:
    """Do something that may wait long for others' answers, so that Ctrl-C ends the process at once.

    The libraries that wait do not hear of it. All writes are atomic, and the lock of a process
    that is dead is removed by the next one.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(1)
    except KeyboardInterrupt:
        print(f"\n{MESSAGE}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    if errors:
        raise errors[0]
    return results[0]
