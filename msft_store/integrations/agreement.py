"""What the processes of a training agree on, so that none waits for another that has failed.

In a group of ``torch.distributed`` all processes make the same calls in the same order; where there
is no group, a process is on its own.

Example::

    rows = gathered(generators())                   # of all processes, by rank
    ckpt = in_main_process(lambda: timeline.commit(tensors).id)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from msft_store.errors import StorageError

_T = TypeVar("_T")


def gathered(value: _T) -> list[_T]:
    """Return the value of every process, by rank."""
    if _size() == 1:
        return [value]
    values: list[Any] = [None] * _size()
    torch.distributed.all_gather_object(values, value)
    return values


def in_main_process(action: Callable[[], _T]) -> _T:
    """Do something in the first process alone; return what it returns, in all of them.

    An error is raised in all: in the first one as it is, elsewhere as a :class:`StorageError` with
    its text.
    """
    if _size() == 1:
        return action()
    failed: Exception | None = None
    said: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            said[0] = action()
        except Exception as error:
            failed = error
            said[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(said)
    if failed is not None:
        raise failed
    if said[1] is not None:
        raise StorageError(f"the main process has failed with {said[1]}")
    result: _T = said[0]
    return result


def _size() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
