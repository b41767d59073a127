"""A backend that fails, or stops as if killed, at its n-th operation; damage to files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from msft_store import Lock, StorageError
from msft_store.storage.backend import Backend, FileStat, Writer
from msft_store.storage.claims import Claim

CHANGES = frozenset({"begin", "write", "finalize", "delete", "move", "sync"})
EVERYTHING = CHANGES | {"exists", "read", "size", "list", "scan", "lock"}


class Stopped(BaseException):
    """The process ends here: nothing is tidied up and nothing else is done."""


class FaultyBackend:
    """Another backend that fails at the n-th operation (from 0) of the given kinds.

    With :class:`Stopped`, every later operation fails too, and unpublished files stay behind.
    A write fails after half of its bytes.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        error: type[BaseException] = StorageError,
        kinds: frozenset[str] = EVERYTHING,
    ) -> None:
        self.fail_at: int | None = None
        self.count = 0
        self.failed = False
        self._inner = inner
        self._error = error
        self._kinds = kinds
        self._counting = threading.Lock()
        self._left_behind: list[object] = []

    def arm(self, fail_at: int, error: type[BaseException] | None = None) -> None:
        """Count from 0 again and fail at that operation, maybe with another error from now on."""
        self.count, self.fail_at, self.failed = 0, fail_at, False
        self._error = error or self._error

    def disarm(self) -> None:
        """Fail no more."""
        self.fail_at = None

    def describe(self, path: str) -> str:
        return self._inner.describe(path)

    def exists(self, path: str) -> bool:
        self._operate("exists")
        return self._inner.exists(path)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        self._operate("read")
        return self._inner.read(path, offset, length)

    def size(self, path: str) -> int:
        self._operate("size")
        return self._inner.size(path)

    def list(self, folder: str) -> list[str]:
        self._operate("list")
        return self._inner.list(folder)

    def scan(self, folder: str) -> dict[str, FileStat]:
        self._operate("scan")
        return self._inner.scan(folder)

    def delete(self, path: str) -> None:
        self._operate("delete")
        self._inner.delete(path)

    def move(self, path: str, target: str) -> None:
        self._operate("move")
        self._inner.move(path, target)

    def sync(self, folder: str) -> None:
        self._operate("sync")
        self._inner.sync(folder)

    @contextlib.contextmanager
    def lock(self, *, shared: bool, purpose: str) -> Iterator[None]:
        self._operate("lock")
        with self._inner.lock(shared=shared, purpose=purpose):
            yield

    def claim(self, kind: str, name: str) -> Claim:
        return self._inner.claim(kind, name)

    def locks(self) -> Sequence[Lock]:
        return self._inner.locks()

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        return self._inner.unlock(force=force)

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        self._operate("begin")
        manager = self._inner.writer()
        writer = manager.__enter__()
        try:
            yield FaultyWriter(self, writer)
        except Stopped:
            # Kept alive, for what is collected would tidy up.
            self._left_behind.append(manager)
            raise
        finally:
            if manager not in self._left_behind:
                manager.__exit__(None, None, None)

    def _operate(self, kind: str) -> None:
        if self.strikes(kind):
            self.fail(kind)

    def strikes(self, kind: str) -> bool:
        """Count an operation; return whether it fails."""
        with self._counting:
            if self.failed and issubclass(self._error, Stopped):
                return True
            if self.fail_at is None or kind not in self._kinds:
                return False
            self.count += 1
            if self.count - 1 != self.fail_at:
                return False
            self.failed = True
            return True

    def fail(self, kind: str) -> None:
        """Raise the failure."""
        raise self._error(f"injected failure of operation {self.fail_at}, {kind}")


class FaultyWriter:
    """A writer of a :class:`FaultyBackend`."""

    def __init__(self, backend: FaultyBackend, inner: Writer) -> None:
        self._backend = backend
        self._inner = inner

    @property
    def position(self) -> int:
        return self._inner.position

    def write(self, data: bytes | memoryview) -> None:
        if self._backend.strikes("write"):
            self._inner.write(data[: len(data) // 2])
            self._backend.fail("write")
        self._inner.write(data)

    def finalize(self, path: str) -> None:
        if self._backend.strikes("finalize"):
            self._backend.fail("finalize")
        self._inner.finalize(path)


def changed_at(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
