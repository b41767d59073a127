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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

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
    """Map in threads and yield the results in order; compute at most ``2 * workers`` ahead.

    The calling thread is one of the workers while it waits for a result, because more threads than
    cores would wait for each other.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers - 1) as pool:
        pending: deque[_Task[_T, _R]] = deque()
        try:
            for item in items:
                pending.append(_Task(function, item, pool))
                if len(pending) > 2 * workers:
                    yield _first_result(pending)
            while pending:
                yield _first_result(pending)
        finally:
            for task in pending:
                task.future.cancel()


class _Task(Generic[_T, _R]):
    """A call that a thread of a pool makes, unless another thread makes it before."""

    def __init__(self, function: Callable[[_T], _R], item: _T, pool: Executor) -> None:
        self._function, self._item = function, item
        self.future = pool.submit(function, item)

    def run_here(self) -> bool:
        """Make the call in this thread unless it was begun already; return True if it was not."""
        if not self.future.cancel():
            return False
        self.future = Future()
        try:
            self.future.set_result(self._function(self._item))
        except Exception as error:
            # An interrupt, which is no Exception, does not wait for its turn.
            self.future.set_exception(error)
        return True


def _first_result(pending: deque[_Task[_T, _R]]) -> _R:
    """Remove the first task and return its result; meanwhile make calls that nobody has begun."""
    while not pending[0].future.done() and any(task.run_here() for task in pending):
        pass
    return pending.popleft().future.result()


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
