"""Checks of the contracts. They also work under ``python -O``, which drops assert statements.

Example::

    require(backend.size("refs/best") == 3, "size is the number of bytes")
    require_error(StorageError, backend.read, "absent")
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_R = TypeVar("_R")


def require(condition: object, promise: str) -> None:
    """Raise ``AssertionError`` with the text of a promise that is not kept."""
    if not condition:
        raise AssertionError(promise)


def require_error(kind: type[BaseException], action: Callable[..., object], *given: object) -> None:
    """Raise ``AssertionError`` unless a call raises an error of this kind."""
    try:
        action(*given)
    except kind:
        return
    raise AssertionError(f"{getattr(action, '__name__', action)}{given} raises {kind.__name__}")


def run_in_threads(count: int, action: Callable[[int], _R]) -> list[_R]:
    """Return the results of an action that runs in several threads at once, by thread number."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, range(count)))
