"""Read-only views of a store.

Example::

    overlay = Overlay(backend, {"store.json": data})
    Catalog(overlay).refresh()          # checks a change before it is written
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

from msft_store.errors import StorageError
from msft_store.storage.backend import Backend, FileStat, Writer, scan_by_size
from msft_store.storage.claims import Claim
from msft_store.storage.lock_files import Lock


class ReadOnlyBackend:
    """The other half of a backend that only reads: writing methods raise :class:`StorageError`."""

    def describe(self, path: str) -> str:
        raise NotImplementedError

    def lock(self, *, shared: bool, purpose: str) -> contextlib.AbstractContextManager[None]:
        self._refuse(purpose)

    def claim(self, kind: str, name: str) -> Claim:
        return Claim()

    def locks(self) -> Sequence[Lock]:
        return ()

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        return ()

    def writer(self) -> contextlib.AbstractContextManager[Writer]:
        self._refuse("write")

    def delete(self, path: str) -> None:
        self._refuse("delete")

    def move(self, path: str, target: str) -> None:
        self._refuse("move")

    def sync(self, folder: str) -> None:
        self._refuse("sync")

    def _refuse(self, action: str) -> NoReturn:
        raise StorageError(
            f"cannot {action} in {self.describe('')}: a remote store is only read in place. "
            "Clone it, change the clone and push that"
        )


class Overlay(ReadOnlyBackend):
    """Reads some files from memory, those in ``replaced``, and the others from another backend."""

    def __init__(self, inner: Backend, replaced: Mapping[str, bytes] | None = None) -> None:
        self.replaced = dict(replaced or {})
        self._inner = inner

    def describe(self, path: str) -> str:
        return self._inner.describe(path)

    def exists(self, path: str) -> bool:
        return path in self.replaced or self._inner.exists(path)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self.replaced.get(path)
        if data is None:
            return self._inner.read(path, offset, length)
        return data[offset:] if length is None else data[offset : offset + length]

    def size(self, path: str) -> int:
        data = self.replaced.get(path)
        return self._inner.size(path) if data is None else len(data)

    def list(self, folder: str) -> list[str]:
        start = folder and f"{folder}/"
        below = {path for path in self.replaced if path.startswith(start)}
        return sorted(below.union(self._inner.list(folder)))

    def scan(self, folder: str) -> dict[str, FileStat]:
        return scan_by_size(self, folder)
