"""The interface of a remote: files by relative path, in an object store or anything like one.

Invariants: a file exists completely or not at all. :meth:`Remote.create` and :meth:`Remote.replace`
do not overwrite a file that another writer changed in between, if the medium supports conditional
writes. Each failure is a :class:`StoreError`. A :class:`ConnectionLostError` can be retried.

Example::

    remote = RetryingRemote(ObjectRemote(store, "s3://bucket/run"))
    remote.create("store.json", data)
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from msft_store.errors import StorageError

_log = logging.getLogger(__name__)

PART_BYTES = 8 << 20
"""Bytes of a large file that are read or sent in one request."""
PartReader = Callable[[], Iterator[bytes]]
"""Yields the bytes of a file in parts, from its beginning, each time it is called."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


class ConnectionLostError(StorageError):
    """The remote could not be reached, or the connection broke. A write may have succeeded."""


class Remote(Protocol):
    """Files by relative path in one place, to which other processes write at the same time.

    Write your own to support another kind of storage, and pass it to ``push``, ``pull``, ``clone``
    or ``open_remote`` in the place of a URL. Methods may be called from ``workers`` threads at the
    same time. They raise :class:`ConnectionLostError` if a retry can help, and another
    :class:`StorageError` if it cannot; wrap the object in :class:`RetryingRemote` to get retries.
    FORMAT.md, section 9, states the order in which files are written.

    Attributes:
        workers: The number of calls that may run at the same time, at least 1.
    """

    workers: int

    def describe(self, path: str) -> str:
        """Return the full address of a path, for messages. It must not contain passwords."""

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from deleting files while the returned context is entered.

        It does nothing on media from which nothing is ever deleted. ``purpose`` is ``"push"`` or
        ``"pull"``, to be shown to processes that wait.
        """

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of each file below a folder, by path relative to the remote.

        ``""`` is the whole remote; a folder that does not exist has no files.
        """

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, or ``None`` if it does not exist."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a file from ``offset`` on.

        Raises:
            StorageError: If the file does not exist or has fewer bytes.
        """

    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        """Return the bytes of a small file and an opaque version for :meth:`replace`.

        ``None`` means that the file does not exist.

        Raises:
            StorageError: If the file has more than ``most`` bytes.
        """

    def put(self, path: str, parts: PartReader, size: int) -> None:
        """Write a file, replacing any other. It becomes visible only when it is complete.

        Args:
            path: The file's path. Missing folders are made.
            parts: Returns an iterator over the bytes from the beginning. An implementation may
                call it again to retry.
            size: The total size in bytes.
        """

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it exists; return True if it was written."""

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        """Write a small file if it still has the version that :meth:`read_versioned` returned.

        Return True if it was written.
        """

    def sync(self, folder: str) -> None:
        """Make the entries of a folder durable, also those that other processes wrote."""


class RetryingRemote:
    """Another remote whose calls are retried when the connection breaks.

    The wait doubles from ``delay`` seconds and is randomly prolonged by up to one half.
    """

    def __init__(self, inner: Remote, *, attempts: int = 4, delay: float = 0.5) -> None:
        self._attempts = attempts
        self._delay = delay
        self.workers = inner.workers
        self.describe = inner.describe
        self.session = inner.session
        self.sizes = self._retrying(inner.sizes)
        self.size = self._retrying(inner.size)
        self.read = self._retrying(inner.read)
        self.read_versioned = self._retrying(inner.read_versioned)
        self.put = self._retrying(inner.put)
        # If the reply to an attempt was lost, the retry finds the file that this call wrote and
        # returns False. The caller compares the content.
        self.create = self._retrying(inner.create)
        self.replace = self._retrying(inner.replace)
        self.sync = self._retrying(inner.sync)

    def _retrying(self, call: Callable[_P, _T]) -> Callable[_P, _T]:
        def retry(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            for attempt in range(self._attempts - 1):
                try:
                    return call(*args, **kwargs)
                except ConnectionLostError as error:
                    wait = self._delay * 2**attempt * random.uniform(1, 1.5)  # noqa: S311
                    _log.info("%s; attempt %d follows in %.1f s", error, attempt + 2, wait)
                    time.sleep(wait)
            return call(*args, **kwargs)

        return retry


def as_parts(data: bytes) -> tuple[PartReader, int]:
    """Return the arguments ``parts`` and ``size`` of :meth:`Remote.put` for bytes in memory."""
    return lambda: iter((data,)), len(data)


def split_ranges(size: int) -> Iterator[tuple[int, int]]:
    """Yield the offset and length of each part of a file."""
    for offset in range(0, size, PART_BYTES):
        yield offset, min(PART_BYTES, size - offset)


def redact_url(url: str) -> str:
    """Return a URL without its password and query, which may hold secrets."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}{at}{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, "", "")).rstrip("/")


def filter_folder(folder: str, listed: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Return the listed paths and sizes that are below a folder; all of them for ``""``."""
    return {path: size for path, size in listed if not folder or path.startswith(f"{folder}/")}


def check_length(data: bytes, length: int, what: str) -> bytes:
    """Return data that was read from ``what`` if it has the expected length."""
    if len(data) != length:
        raise StorageError(
            f"{what} is shorter than expected: it changed while it was read", file=what
        )
    return data
