"""What an object store, or anything like one, is to the store: whole files by path.

Invariants: a file is there whole or not at all; ``create`` and ``replace`` never overwrite what
somebody else wrote since it was looked at, where the medium can tell. Each failure is a
:class:`StoreError`; one of the connection, a :class:`ConnectionLostError`, is worth another try.

Example::

    remote = Persistent(remote_at("s3://bucket/run"))
    remote.create("store.json", data)
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from msft_store.errors import StorageError

PART_BYTES = 8 << 20
"""How much of a large file is read or sent at once."""
_T = TypeVar("_T")


class ConnectionLostError(StorageError):
    """A remote could not be reached, or the connection broke; nothing else is known."""


class Remote(Protocol):
    """Files by relative path in one place, which others write to at the same time."""

    workers: int
    """How many calls it takes at once."""

    def describe(self, path: str) -> str:
        """Return a path as a person would look for it."""

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Keep others from deleting what is there, if anybody deletes."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes in bytes of all files below a folder, by path."""

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes; ``None`` if it is not there."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``; the file has them."""

    def whole(self, path: str, most: int) -> tuple[bytes, Any] | None:
        """Return a file, and its version for :meth:`replace`; ``None`` if it is not there.

        :class:`StorageError` if it has more than ``most`` bytes.
        """

    def put(self, path: str, parts: Callable[[], Iterator[bytes]], size: int) -> None:
        """Write a file of ``size`` bytes, visible at once and whole, in place of any other.

        ``parts`` gives its bytes from the beginning each time it is called.
        """

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one; return whether it was written."""

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        """Write a file if its version is still this one; return whether it was written."""

    def settle(self, folder: str) -> None:
        """Make durable which files are below a folder, whoever wrote them."""


class Persistent:
    """Another remote, each call of which is tried again when the connection breaks.

    The waits grow twofold from ``delay`` seconds, by chance up to half as long again.
    """

    def __init__(self, inner: Remote, *, attempts: int = 4, delay: float = 0.5) -> None:
        self.workers = inner.workers
        self._inner = inner
        self._attempts = attempts
        self._delay = delay

    def describe(self, path: str) -> str:
        return self._inner.describe(path)

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        return self._inner.session(purpose)

    def sizes(self, folder: str) -> dict[str, int]:
        return self._persist(lambda: self._inner.sizes(folder))

    def size(self, path: str) -> int | None:
        return self._persist(lambda: self._inner.size(path))

    def read(self, path: str, offset: int, length: int) -> bytes:
        return self._persist(lambda: self._inner.read(path, offset, length))

    def whole(self, path: str, most: int) -> tuple[bytes, Any] | None:
        return self._persist(lambda: self._inner.whole(path, most))

    def put(self, path: str, parts: Callable[[], Iterator[bytes]], size: int) -> None:
        self._persist(lambda: self._inner.put(path, parts, size))

    def create(self, path: str, data: bytes) -> bool:
        # Where the reply to an attempt was lost, a later one finds a file: who calls compares it.
        return self._persist(lambda: self._inner.create(path, data))

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        return self._persist(lambda: self._inner.replace(path, data, version))

    def settle(self, folder: str) -> None:
        self._persist(lambda: self._inner.settle(folder))

    def _persist(self, act: Callable[[], _T]) -> _T:
        for attempt in range(self._attempts - 1):
            try:
                return act()
            except ConnectionLostError:
                time.sleep(self._delay * 2**attempt * random.uniform(1, 1.5))  # noqa: S311
        return act()


def small(data: bytes) -> tuple[Callable[[], Iterator[bytes]], int]:
    """Return what :meth:`Remote.put` wants of bytes that are in memory."""
    return lambda: iter((data,)), len(data)


def spans(size: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the parts of a file."""
    for offset in range(0, size, PART_BYTES):
        yield offset, min(PART_BYTES, size - offset)


def shown(url: str) -> str:
    """Return a URL without what must not be seen: a password, a query."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}{at}{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, "", "")).rstrip("/")


def names(folder: str, listed: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Return those of some paths and sizes that are below a folder; all, if it is ``""``."""
    return {path: size for path, size in listed if not folder or path.startswith(f"{folder}/")}
