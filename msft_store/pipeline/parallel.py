"""Map a function over items in threads.

Invariant: results come in the order of the items, and only a few are computed ahead.

Example::

    with closing(in_order(decode, chunks)) as results:
        for data in results: ...
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(8, _CORES or 1)
"""Number of threads: one for each core, but at most eight.

Encoding a chunk of 4 MiB takes up to 40 MB of memory, and eight threads keep up with any disk.
"""


def in_order(
    function: Callable[[_T], _R], items: Iterator[_T], workers: int = WORKERS
) -> Generator[_R, None, None]:
    """Map in threads and yield the results in order; compute at most ``2 * workers`` ahead."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[_R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def for_each(function: Callable[[_T], object], items: Iterator[_T], workers: int = WORKERS) -> None:
    """Call a function on each item in threads; raise the error of the first item that has one.

    Each thread takes the next item when it is ready, which costs less than a future for each.
    """
    numbered, taking, stopped = enumerate(items), threading.Lock(), threading.Event()
    errors: dict[int, BaseException] = {}

    def work(_: int) -> None:
        while not stopped.is_set():
            with taking:
                taken = next(numbered, None)
            if taken is None:
                return
            try:
                function(taken[1])
            except BaseException as error:
                errors[taken[0]] = error
                stopped.set()

    if workers == 1:
        work(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(work, range(workers)))
            finally:
                stopped.set()
    if errors:
        raise errors[min(errors)]
