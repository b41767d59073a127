"""A remote that fails at its n-th operation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from msft_store import StorageError
from msft_store.remote.transport.base import Remote


class FaultyRemote:
    """Wraps a remote; fails at the n-th operation (from 0) and records the paths of all writes."""

    workers = 1

    def __init__(self, inner: Remote, *, error: type[BaseException] = StorageError) -> None:
        self.fail_at: int | None = None
        self.count = 0
        self.put_paths: list[str] = []
        self.read_bytes = 0
        self.before: Callable[[str, str], None] = lambda kind, path: None
        self._inner = inner
        self._error = error
        self._counting = threading.Lock()

    def describe(self, path: str) -> str:
        return self._inner.describe(path)

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        return self._inner.session(purpose)

    def sizes(self, folder: str) -> dict[str, int]:
        self._operate("sizes", folder)
        return self._inner.sizes(folder)

    def size(self, path: str) -> int | None:
        self._operate("size", path)
        return self._inner.size(path)

    def read(self, path: str, offset: int, length: int) -> bytes:
        self._operate("read", path)
        self.read_bytes += length
        return self._inner.read(path, offset, length)

    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        self._operate("read_versioned", path)
        return self._inner.read_versioned(path, most)

    def put(self, path: str, parts: Callable[[], Iterator[bytes]], size: int) -> None:
        self._operate("put", path)
        self._inner.put(path, parts, size)
        self.put_paths.append(path)

    def create(self, path: str, data: bytes) -> bool:
        self._operate("create", path)
        done = self._inner.create(path, data)
        self.put_paths += [path] * done
        # A failure here is a lost reply to a write that succeeded.
        self._operate("created", path)
        return done

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        self._operate("replace", path)
        done = self._inner.replace(path, data, version)
        self.put_paths += [path] * done
        self._operate("replaced", path)
        return done

    def sync(self, folder: str) -> None:
        self._operate("sync", folder)
        self._inner.sync(folder)

    def _operate(self, kind: str, path: str) -> None:
        self.before(kind, path)
        with self._counting:
            self.count += 1
            if self.count - 1 == self.fail_at:
                raise self._error(f"injected failure of operation {self.fail_at}: {kind} {path}")
