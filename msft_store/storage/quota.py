"""A bound on all bytes of a store's directory, kept at every write.

Invariants: while a thread is within a bound, it begins no write after which the files of the
directory would take more than that, temporary files and those of every other writer included.
What other processes write meanwhile is seen when the next file is begun. Outside of a bound
nothing is counted.

Example::

    backend = QuotaBackend(LocalBackend(path))
    with backend.within(10**9), backend.writer() as writer:
        writer.write(data)                      # OverBudgetError if that would be too much
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from msft_store._util import format_bytes
from msft_store.errors import OutOfSpaceError, OverBudgetError
from msft_store.storage.backend import Backend, FileStat, Writer, disk_bytes
from msft_store.storage.claims import Claim
from msft_store.storage.lock_files import Lock


@runtime_checkable
class HasFreeBytes(Protocol):
    """What a backend may have besides, if its medium can be full."""

    def free_bytes(self) -> int | None:
        """Return the bytes that certainly cannot be exceeded by more files; ``None``: unknown."""


@dataclass(frozen=True, kw_only=True)
class _Bound:
    max_bytes: int
    reserve: int

    def refusal(self, used: int, count: int) -> OverBudgetError:
        kept = (
            f", {format_bytes(self.reserve)} of which are kept for small files"
            if self.reserve
            else ""
        )
        return OverBudgetError(
            f"{format_bytes(count)} more do not fit: the store takes {format_bytes(used)} of its "
            f"disk budget of {format_bytes(self.max_bytes)}{kept}. Raise it, or let the "
            "policy keep less"
        )


class _Local(threading.local):
    bound: _Bound | None = None


class QuotaBackend:
    """Another backend, whose writes can be held within a bound."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._local = _Local()
        self._counting = threading.Lock()
        self._open: list[_QuotaWriter] = []
        self._used = 0
        """Bytes on disk, at least where a writer is open within a bound."""

    @contextlib.contextmanager
    def limit(self, max_bytes: int | None, *, reserve: int = 0) -> Iterator[None]:
        """Hold what this thread writes to a bound in bytes; ``None``: to none.

        ``reserve`` bytes of it stay free. Where bounds are nested, the inner one counts.
        """
        before = self._local.bound
        self._local.bound = None
        if max_bytes is not None:
            self._local.bound = _Bound(max_bytes=max_bytes, reserve=reserve)
        try:
            yield
        finally:
            self._local.bound = before

    def require_space(self, count: int) -> None:
        """Refuse ``count`` more bytes if they certainly do not fit, before any is written.

        :class:`OverBudgetError` where the bound is too low, :class:`OutOfSpaceError` where the disk
        is too full.
        """
        bound = self._local.bound
        if bound is not None:
            used = disk_bytes(self._inner)
            if used + count > bound.max_bytes - bound.reserve:
                raise bound.refusal(used, count)
        room = self._inner.free_bytes() if isinstance(self._inner, HasFreeBytes) else None
        if room is not None and count > room:
            raise OutOfSpaceError(
                f"{format_bytes(count)} more do not fit on the disk of {self.describe('')}: "
                f"{format_bytes(room)} are free. Make room, or run msft-store gc"
            )

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        """Begin a file; each of its writes is counted first."""
        with self._inner.writer() as inner:
            writer = _QuotaWriter(self, inner, self._local.bound)
            with self._counting:
                if writer.bound is not None:
                    # Files that are open may be on disk in part: counted twice rather than not.
                    flushed = sum(other.position for other in self._open)
                    self._used = disk_bytes(self._inner) + flushed
                self._open.append(writer)
            try:
                yield writer
            finally:
                with self._counting:
                    self._open.remove(writer)

    def count(self, bound: _Bound | None, count: int) -> None:
        """Count bytes before they are written; :class:`OverBudgetError` if they do not fit."""
        with self._counting:
            if bound is not None and self._used + count > bound.max_bytes - bound.reserve:
                raise bound.refusal(self._used, count)
            self._used += count

    def describe(self, path: str) -> str:
        return self._inner.describe(path)

    def exists(self, path: str) -> bool:
        return self._inner.exists(path)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._inner.read(path, offset, length)

    def size(self, path: str) -> int:
        return self._inner.size(path)

    def list(self, folder: str) -> list[str]:
        return self._inner.list(folder)

    def scan(self, folder: str) -> dict[str, FileStat]:
        return self._inner.scan(folder)

    def delete(self, path: str) -> None:
        self._inner.delete(path)

    def move(self, path: str, target: str) -> None:
        self._inner.move(path, target)

    def sync(self, folder: str) -> None:
        self._inner.sync(folder)

    def lock(self, *, shared: bool, purpose: str) -> contextlib.AbstractContextManager[None]:
        return self._inner.lock(shared=shared, purpose=purpose)

    def claim(self, kind: str, name: str) -> Claim:
        return self._inner.claim(kind, name)

    def locks(self) -> Sequence[Lock]:
        return self._inner.locks()

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        return self._inner.unlock(force=force)


class _QuotaWriter:
    def __init__(self, backend: QuotaBackend, inner: Writer, bound: _Bound | None) -> None:
        self.bound = bound
        self._backend = backend
        self._inner = inner

    @property
    def position(self) -> int:
        return self._inner.position

    def write(self, data: bytes | memoryview) -> None:
        self._backend.count(self.bound, len(data))
        self._inner.write(data)

    def finalize(self, path: str) -> None:
        self._inner.finalize(path)


def require_space(backend: Backend, count: int) -> None:
    """Refuse bytes that certainly do not fit, where the backend is :class:`QuotaBackend`."""
    if isinstance(backend, QuotaBackend):
        backend.require_space(count)
