"""A disk of a few kilobytes: a backend with a quota, and one that records its usage.

Example::

    store = Store(QuotaBackend(root, quota=bytes_on_disk(root) + 1000))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from msft_store import OutOfSpaceError
from msft_store.storage.backend import LocalBackend, Writer


def bytes_on_disk(root: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(bytes_of(path) for path in root.rglob("*"))


def bytes_of(path: Path) -> int:
    """Return the size of a file; 0 of a folder, and of what has just gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0


class QuotaBackend(LocalBackend):
    """A folder on a disk with ``quota`` bytes; a write beyond it is written in part.

    ``largest`` is what all files ever took at once.
    """

    def __init__(self, root: Path, *, quota: int = 1 << 60) -> None:
        super().__init__(root, lock_timeout=10.0)
        self.quota = quota
        self.largest = bytes_on_disk(root)
        self.lacked = 0
        """The bytes that the first refused write lacked."""
        self._open: dict[Path, _QuotaWriter] = {}

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        with super().writer() as inner:
            path: Path = inner._path
            writer = _QuotaWriter(self, inner)
            self._open[path] = writer
            try:
                yield writer
            finally:
                del self._open[path]

    def used(self) -> int:
        """Return the bytes of all files; an open file counts with the bytes written to it."""
        on_disk = sum(bytes_of(path) for path in self.root.rglob("*") if path not in self._open)
        return on_disk + sum(
            writer.position for writer in list(self._open.values()) if writer.unfinalized
        )

    def take(self, size: int) -> int:
        """Return how many of ``size`` more bytes fit."""
        used = self.used()
        fits = min(max(self.quota - used, 0), size)
        self.largest = max(self.largest, used + fits)
        self.lacked = self.lacked or size - fits
        return fits


class _QuotaWriter:
    def __init__(self, backend: QuotaBackend, inner: Writer) -> None:
        self._backend = backend
        self._inner = inner
        self.unfinalized = True

    @property
    def position(self) -> int:
        return self._inner.position

    def write(self, data: bytes | memoryview) -> None:
        fits = self._backend.take(len(data))
        self._inner.write(data[:fits])
        if fits < len(data):
            where = self._backend.describe("")
            raise OutOfSpaceError(f"no space left to write {len(data)} more bytes to {where}")

    def finalize(self, path: str) -> None:
        self._inner.finalize(path)
        self.unfinalized = False
