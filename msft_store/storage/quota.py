"""A limit on the total size of a store's directory, checked at every write.

Invariants: while a thread is within a limit, it begins no write after which the files of the
directory would exceed that limit. Temporary files and the files of all other writers count. Files
of other processes are counted when the next file is begun. Without a limit nothing is counted.

Example::

    backend = QuotaBackend(LocalBackend(path))
    with backend.limit(10**9), backend.writer() as writer:
        writer.write(data)                      # OverBudgetError if it would exceed the limit
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from msft_store._util import format_bytes
from msft_store.errors import OutOfSpaceError, OverBudgetError
from msft_store.storage.backend import Backend, Writer, disk_bytes


@runtime_checkable
class HasFreeBytes(Protocol):
    """An optional part of a backend, for a medium that can be full."""

    def free_bytes(self) -> int | None:
        """Return an upper bound of the free bytes; ``None`` if it is unknown."""


@dataclass(frozen=True, kw_only=True)
class _Limit:
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
    limit: _Limit | None = None


class QuotaBackend:
    """A backend that can limit the total size of another one."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.describe = inner.describe
        self.exists = inner.exists
        self.read = inner.read
        self.size = inner.size
        self.list = inner.list
        self.scan = inner.scan
        self.delete = inner.delete
        self.move = inner.move
        self.sync = inner.sync
        self.lock = inner.lock
        self.claim = inner.claim
        self.locks = inner.locks
        self.unlock = inner.unlock
        self._local = _Local()
        self._counting = threading.Lock()
        self._open: list[_QuotaWriter] = []
        self._used = 0
        """Bytes on disk; up to date while a writer is open within a limit."""

    @contextlib.contextmanager
    def limit(self, max_bytes: int | None, *, reserve: int = 0) -> Iterator[None]:
        """Limit the total size in bytes for the writes of this thread; ``None`` lifts the limit.

        ``reserve`` bytes of it stay free. Of nested limits, the inner one applies.
        """
        before = self._local.limit
        self._local.limit = None
        if max_bytes is not None:
            self._local.limit = _Limit(max_bytes=max_bytes, reserve=reserve)
        try:
            yield
        finally:
            self._local.limit = before

    def require_space(self, count: int) -> None:
        """Raise an error if ``count`` more bytes certainly do not fit, before any is written.

        :class:`OverBudgetError` if the limit is too low, :class:`OutOfSpaceError` if the disk is
        too full.
        """
        limit = self._local.limit
        if limit is not None:
            used = disk_bytes(self.inner)
            if used + count > limit.max_bytes - limit.reserve:
                raise limit.refusal(used, count)
        room = self.inner.free_bytes() if isinstance(self.inner, HasFreeBytes) else None
        if room is not None and count > room:
            raise OutOfSpaceError(
                f"{format_bytes(count)} more do not fit on the disk of {self.describe('')}: "
                f"{format_bytes(room)} are free. Make room, or run msft-store gc"
            )

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        """Open a temporary file whose writes are counted before they are done."""
        with self.inner.writer() as inner:
            writer = _QuotaWriter(self, inner, self._local.limit)
            with self._counting:
                if writer.limit is not None:
                    # Parts of open files may be on disk already. They are counted twice, because
                    # counting too much is safe.
                    flushed = sum(other.position for other in self._open)
                    self._used = disk_bytes(self.inner) + flushed
                self._open.append(writer)
            try:
                yield writer
            finally:
                with self._counting:
                    self._open.remove(writer)

    def count(self, limit: _Limit | None, count: int) -> None:
        """Count bytes before they are written; :class:`OverBudgetError` if they do not fit."""
        with self._counting:
            if limit is not None and self._used + count > limit.max_bytes - limit.reserve:
                raise limit.refusal(self._used, count)
            self._used += count


class _QuotaWriter:
    def __init__(self, backend: QuotaBackend, inner: Writer, limit: _Limit | None) -> None:
        self.limit = limit
        self._backend = backend
        self.finalize = inner.finalize
        self._inner = inner

    @property
    def position(self) -> int:
        return self._inner.position

    def write(self, data: bytes | memoryview) -> None:
        self._backend.count(self.limit, len(data))
        self._inner.write(data)


def require_space(backend: Backend, count: int) -> None:
    """Raise an error if ``count`` bytes do not fit a :class:`QuotaBackend`."""
    if isinstance(backend, QuotaBackend):
        backend.require_space(count)
