"""Fail the n-th operation of a backend, by an error or as if the process were killed there.

Example::

    backend = FaultyBackend(LocalBackend(Path("run/store")), kinds=WRITE_OPERATIONS)
    faulty = Store(backend)
    backend.arm(3, SimulatedKill)
    with contextlib.suppress(SimulatedKill):
        faulty.save(weights)
    print(backend.failed, Store.open("run/store").check())
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import torch

from msft_store.errors import OutOfSpaceError, StorageError
from msft_store.objects.catalog import CONFIG, Config, encode_config
from msft_store.storage.backend import Backend, FileStat, Writer, write_atomic
from msft_store.store import Store
from msft_store.testing.expect import require

WRITE_OPERATIONS = frozenset({"begin", "write", "finalize", "delete", "move", "sync"})
"""Kinds of operations that change files; ``begin`` is the opening of a writer."""
ALL_OPERATIONS = WRITE_OPERATIONS | {"exists", "read", "size", "list", "scan", "lock"}
"""Kinds of operations that can fail."""


class SimulatedKill(BaseException):
    """The process counts as killed: nothing is tidied up, and every later operation fails too."""


class FaultyBackend:
    """Another backend that fails at one operation, of the kinds that are counted, with an error.

    A write fails after half of its bytes. After a :class:`SimulatedKill` the temporary files stay.

    Attributes:
        fail_at: Number of the operation that fails, from 0; ``None`` lets all succeed.
        count: Number of the operations since the last :meth:`arm`.
        failed: True once the operation has failed.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        error: type[BaseException] = StorageError,
        kinds: frozenset[str] = ALL_OPERATIONS,
    ) -> None:
        self.fail_at: int | None = None
        self.count = 0
        self.failed = False
        self.describe = inner.describe
        self.claim = inner.claim
        self.locks = inner.locks
        self.unlock = inner.unlock
        self._inner = inner
        self._error = error
        self._kinds = kinds
        self._counting = threading.Lock()
        self._left_behind: list[object] = []

    def arm(self, fail_at: int, error: type[BaseException] | None = None) -> None:
        """Count from 0 again and fail at one operation, by this type of error if one is given."""
        self.count, self.fail_at, self.failed = 0, fail_at, False
        self._error = error or self._error

    def disarm(self) -> None:
        """Let all further operations succeed, unless the process counts as killed."""
        self.fail_at = None

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

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        self._operate("begin")
        manager = self._inner.writer()
        writer = manager.__enter__()
        try:
            yield _FaultyWriter(self, writer)
        except SimulatedKill:
            # The context is kept alive, because its garbage collection would discard the file.
            self._left_behind.append(manager)
            raise
        finally:
            if manager not in self._left_behind:
                manager.__exit__(None, None, None)

    def _operate(self, kind: str) -> None:
        if self.strikes(kind):
            self.fail(kind)

    def strikes(self, kind: str) -> bool:
        """Count an operation; return True if it fails."""
        with self._counting:
            if self.failed and issubclass(self._error, SimulatedKill):
                return True
            if self.fail_at is None or kind not in self._kinds:
                return False
            self.count += 1
            if self.count - 1 != self.fail_at:
                return False
            self.failed = True
            return True

    def fail(self, kind: str) -> None:
        """Raise the failure of an operation."""
        raise self._error(f"injected failure of operation {self.fail_at}, {kind}")


class _FaultyWriter:
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


def check_faults(backend: Backend, *, every: int = 1) -> int:
    """Fail every operation of a save, a load and a gc in turn, and check the store each time.

    The failures are an error, a full disk and a :class:`SimulatedKill`. After each the store has no
    damage, its earlier checkpoint loads exactly, a save succeeds, and a gc removes what was left.

    Args:
        backend: An empty backend; it holds a store afterwards.
        every: Distance of the operations that fail; 1 lets each of them fail.

    Returns:
        The number of injected failures.
    """
    write_atomic(backend, CONFIG, encode_config(Config()))
    store = Store(backend)
    first, second = ({"w": torch.arange(1000) * number} for number in (1, 3))
    kept = store.save(first)
    injected = 0
    for error, kinds in (
        (StorageError, ALL_OPERATIONS),
        (OutOfSpaceError, WRITE_OPERATIONS),
        (SimulatedKill, WRITE_OPERATIONS),
    ):
        for fail_at in itertools.count(0, every):
            faulty = FaultyBackend(backend, error=error, kinds=kinds)
            with contextlib.suppress(error):
                working = Store(faulty)
                faulty.arm(fail_at)
                lost = working.save(second, parent=kept)
                working.load(lost)
                working.forget(lost)
                working.plan_gc().execute()
            if not faulty.failed:
                break
            injected += 1
            fault = f"after a {error.__name__} of operation {fail_at}"
            require(store.check() == [], f"{fault} the store is undamaged")
            require(torch.equal(store.load(kept)["w"], first["w"]), f"{fault} the data is exact")
            saved = store.save(second, parent=kept)
            require(torch.equal(store.load(saved)["w"], second["w"]), f"{fault} a save is exact")
            store.forget(saved)
            store.plan_gc().execute()
            require(store.log() == [kept], f"{fault} a gc leaves the earlier checkpoint")
            plan = store.plan_gc()
            require(not (plan.delete or plan.rewrite or plan.leftovers), f"{fault} a gc tidies up")
    return injected
