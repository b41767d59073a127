"""Show the progress of a transfer at a terminal, and let Ctrl-C end a transfer at once.

Example::

    with progress_bar(enabled=not options.json) as progress:
        push(store, url, progress=progress)
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from tqdm import tqdm

from msft_store.remote.transfer import Progress

_T = TypeVar("_T")
MESSAGE = "msft-store: interrupted; all files are complete, and the command can be repeated"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


@contextlib.contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Progress | None]:
    """Yield a function that shows progress in a bar on stderr; ``None`` without a terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, leave=False) as bar:

        def update(step: str, done: int, total: int) -> None:
            if bar.desc != f"{step}: ":
                bar.reset(total or None)
                bar.set_description(step)
            bar.update(done - bar.n)

        yield update


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
        # Wake up now and then: a signal just before the wait does not end the wait.
        while not future.done():
            wait([future], timeout=0.5)
        return future.result()
    except KeyboardInterrupt:
        print(f"\n{MESSAGE}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
