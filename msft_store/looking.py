"""A look at a whole store while others forget, move and delete.

Reading takes no lock, so what was listed may have gone when it is read. That is no damage: where a
look fails or finds something wrong, and files have come or gone, it is repeated while nobody may
delete.

Example::

    plan = undisturbed(backend, lambda: plan_gc(catalog))
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from msft_store.backend import Backend
from msft_store.errors import BusyError, StorageError, StoreError
from msft_store.manifest import FOLDER as MANIFESTS
from msft_store.packs import FOLDER as PACKS
from msft_store.refs import FOLDER as REFS

_T = TypeVar("_T")


def undisturbed(
    backend: Backend,
    look: Callable[[], _T],
    is_fine: Callable[[_T], bool] = lambda _: True,
    *,
    times: int = 1,
) -> _T:
    """Return what ``look`` returns, or raise what it raises, once others have no part in it.

    It may be called ``times`` times without the lock, for one that takes long, and once with it.
    """
    for _ in range(times):
        before = _names(backend)
        try:
            found = look()
            if is_fine(found) or _names(backend) == before:
                return found
        except StoreError:
            if _names(backend) == before:
                raise
    with contextlib.ExitStack() as stack:
        # A store that cannot be written to is looked at all the same.
        with contextlib.suppress(BusyError, StorageError):
            stack.enter_context(backend.lock(shared=True, purpose="look"))
        return look()


def _names(backend: Backend) -> set[str]:
    return {path for folder in (MANIFESTS, PACKS, REFS) for path in backend.list(folder)}
