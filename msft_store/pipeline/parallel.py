"""Mapping in threads: in order, a few items ahead.

Example::

    with closing(in_order(decode, chunks)) as results:
        for data in results: ...
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(8, _CORES or 1)
"""How many threads work on chunks: one for each core, and no more than memory is promised for.

Encoding a chunk of 4 MiB takes up to some 40 MB; eight of them keep up with any disk.
"""


def in_order(
    function: Callable[[_T], _R], items: Iterator[_T], workers: int = WORKERS
) -> Generator[_R, None, None]:
    """Map in threads, a few items ahead, and yield the results in order."""
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
