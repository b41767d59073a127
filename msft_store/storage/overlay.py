"""A read-only view of a store in which some files are replaced, to check a change before writing
it.

Example::

    overlay = Overlay(backend)
    overlay.replaced["store.json"] = data
    Catalog(overlay).refresh()
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NoReturn

from msft_store.errors import StorageError
from msft_store.storage.backend import Backend, FileStat, Writer, scan_by_size
from msft_store.storage.claims import Claim
from msft_store.storage.lock_files import Lock


class Overlay:
    """A backend that reads some files from memory and the others from another backend."""

    def __init__(self, inner: Backend) -> None:
        self.replaced: dict[str, bytes] = {}
        """New contents of files, by path."""
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
        below = {path for path in self.replaced if path.startswith(f"{folder}/")}
        return sorted(below.union(self._inner.list(folder)))

    def scan(self, folder: str) -> dict[str, FileStat]:
        return scan_by_size(self, folder)

    def lock(self, *, shared: bool, purpose: str) -> contextlib.AbstractContextManager[None]:
        return self._inner.lock(shared=shared, purpose=purpose)

    def claim(self, kind: str, name: str) -> Claim:
        return Claim()

    def locks(self) -> Sequence[Lock]:
        return self._inner.locks()

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        self._refuse()

    def writer(self) -> contextlib.AbstractContextManager[Writer]:
        self._refuse()

    def delete(self, path: str) -> None:
        self._refuse()

    def move(self, path: str, target: str) -> None:
        self._refuse()

    def sync(self, folder: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StorageError(f"{self.describe('')} is opened read-only")
