"""Show the progress of a transfer at a terminal, and let Ctrl-C end a transfer at once.

Example::

    with progress_line(enabled=not options.json) as progress:
        push(store, url, progress=progress)
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from msft_store._util import format_bytes
from msft_store.remote.transfer import Progress

_T = TypeVar("_T")
_INTERVAL = 0.2
"""Seconds between two updates of the line."""
_ERASE = "\r\x1b[K"
MESSAGE = "msft-store: interrupted; all files are complete, and the command can be repeated"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


@contextlib.contextmanager
def progress_line(*, enabled: bool) -> Iterator[Progress | None]:
    """Yield a function that shows progress in one line on stderr; ``None`` without a terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    shown = _Line()
    try:
        yield shown.update
    finally:
        shown.erase()


class _Line:
    def __init__(self) -> None:
        self._step = ""
        self._begun = self._last = 0.0
        self._ended = False

    def update(self, step: str, done: int, total: int) -> None:
        """Show a step, its bytes so far, its total bytes and the speed."""
        now = time.monotonic()
        if step != self._step:
            self._step, self._begun = step, now
        elif self._ended or (now - self._last < _INTERVAL and done != total):
            return
        self._last = now
        text = step
        if total:
            text += f" {format_bytes(done)} of {format_bytes(total)}"
            if now > self._begun:
                text += f", {format_bytes(int(done / (now - self._begun)))}/s"
        print(f"{_ERASE}{text}", end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        self._ended = True
        print(_ERASE, end="", file=sys.stderr, flush=True)


def run_interruptibly(operation: Callable[[], _T]) -> _T:
    """Run an operation that may wait long for a server, so that Ctrl-C ends the process at once.

    The network libraries do not react to Ctrl-C while they wait. Ending the process is safe,
    because all writes are atomic, and the next process removes the lock of a dead one.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(operation())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        return future.result()
    except KeyboardInterrupt:
        print(f"\n{MESSAGE}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
