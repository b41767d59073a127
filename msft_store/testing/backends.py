"""The promises of :class:`~msft_store.storage.backend.Backend`, as tests for pytest.

Durability is not tested, because no program can cause a power loss. A subclass sets a test to
``None`` if its promise does not apply.

Example::

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self, tmp_path):
            return MyBackend(tmp_path)
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from msft_store.errors import BusyError, StorageError, StoreError
from msft_store.storage.backend import Backend, write_atomic
from msft_store.testing.expect import require, require_error, run_in_threads
from msft_store.testing.faults import check_faults

FILES = {
    "top": b"t",
    "data/b/2": b"two",
    "data/b-1": b"one!",
    "data/a": bytes(range(256)),
    "data/b/1": b"",
    "database/x": b"x",
}
"""Files whose order by path differs from the order by folder."""
FOLDERS = ("data", "data/b", "absent", "data/absent")
_MOMENT, _PATIENCE = 0.1, 30.0
"""Seconds in which nothing must happen, and in which something must."""


def files_below(folder: str) -> dict[str, bytes]:
    """Return the part of :data:`FILES` below a folder, sorted by path."""
    return {path: FILES[path] for path in sorted(FILES) if path.startswith(f"{folder}/")}


class ReadContract:
    """The promises of the reading methods, for a backend that cannot be written.

    A subclass has a fixture ``backend`` that returns an empty backend, and its own ``put``.
    """

    def put(self, backend: Backend, files: Mapping[str, bytes]) -> None:
        """Let the backend have these files."""
        for path, data in files.items():
            write_atomic(backend, path, data)

    def test_describe_contains_the_path(self, backend: Backend) -> None:
        require("data/a" in backend.describe("data/a"), "describe contains the path")
        require(backend.describe(""), "describe has a name for the store itself")

    def test_exists_is_true_for_files_only(self, backend: Backend) -> None:
        self.put(backend, FILES)
        require(all(map(backend.exists, FILES)), "exists is True for a file")
        for path in (*FOLDERS, "top-absent"):
            require(not backend.exists(path), f"exists is False for {path}")

    def test_read_returns_any_range(self, backend: Backend) -> None:
        self.put(backend, FILES)
        for path, data in FILES.items():
            require(backend.read(path) == data, f"read returns all bytes of {path}")
        data = FILES["data/a"]
        for offset, length in ((0, 0), (0, 256), (3, 5), (250, 100), (256, 1), (9, None)):
            expected = data[offset:][:length]
            found = backend.read("data/a", offset, length)
            require(found == expected, f"read from {offset} on returns {len(expected)} bytes")

    def test_an_absent_file_raises_a_storage_error(self, backend: Backend) -> None:
        self.put(backend, FILES)
        for path in ("absent", "data/absent"):
            require_error(StorageError, backend.read, path)
            require_error(StorageError, backend.size, path)

    def test_list_is_sorted_and_complete(self, backend: Backend) -> None:
        self.put(backend, FILES)
        for folder in FOLDERS:
            below = list(files_below(folder))
            require(backend.list(folder) == below, f"list({folder!r}) is {below}")
        whole = backend.list("")
        require(whole == sorted(whole) and FILES.keys() <= set(whole), "list('') is the store")

    def test_scan_and_size_agree_with_list(self, backend: Backend) -> None:
        self.put(backend, FILES)
        for path, data in FILES.items():
            require(backend.size(path) == len(data), f"size of {path} is {len(data)}")
        for folder in (*FOLDERS, ""):
            found = backend.scan(folder)
            require(list(found) == backend.list(folder), f"scan({folder!r}) has the listed paths")
            for path, stat in found.items():
                require(stat.size == backend.size(path), f"scan has the size of {path}")
                hash(stat.version)

    def test_several_threads_read_at_once(self, backend: Backend) -> None:
        self.put(backend, FILES)

        def read(number: int) -> dict[str, bytes]:
            return {path: backend.read(path) for path in FILES}

        require(run_in_threads(8, read) == [FILES] * 8, "all threads read the same")


class BackendContract(ReadContract):
    """All promises of a backend. A subclass has a fixture ``backend`` that returns an empty one."""

    def test_a_file_is_visible_once_it_is_finalized(self, backend: Backend) -> None:
        buffer = bytearray(b"one")
        with backend.writer() as writer:
            require(writer.position == 0, "position begins at 0")
            writer.write(memoryview(buffer))
            buffer[:] = b"xxx"
            writer.write(b"two")
            require(writer.position == 6, "position counts the written bytes")
            require(not backend.exists("data/new"), "a file is invisible before finalize")
            writer.finalize("data/new")
            require(backend.read("data/new") == b"onetwo", "the caller may reuse the buffer")
        require(backend.list("data") == ["data/new"], "a finalized file stays")

    def test_a_writer_that_is_left_discards_its_file(self, backend: Backend) -> None:
        before = backend.list("")
        with backend.writer() as writer:
            writer.write(b"lost")
        with contextlib.suppress(ZeroDivisionError), backend.writer() as writer:
            writer.write(b"lost")
            raise ZeroDivisionError
        require(backend.list("") == before, "a writer that is left without finalize leaves no file")

    def test_finalize_replaces_a_file_atomically(self, backend: Backend) -> None:
        contents = [bytes([number]) * (1 << 20) for number in range(10)]
        seen = set()

        def replace() -> None:
            for data in contents:
                self.put(backend, {"data/file": data})

        self.put(backend, {"data/file": contents[0]})
        for _ in _while_running(replace):
            seen.add(backend.read("data/file"))
        require(seen <= set(contents), "a reader sees the whole old or the whole new file")
        require(backend.read("data/file") == contents[-1], "finalize replaces a file")

    def test_a_version_changes_when_the_file_is_written(self, backend: Backend) -> None:
        written: dict[object, int] = {}
        for number in range(3):
            self.put(backend, {"data/file": bytes([number])})
            # A backend may need some time until it can tell two versions apart.
            for _ in range(2):
                version = backend.scan("data")["data/file"].version
                first = number if version is None else written.setdefault(version, number)
                require(first == number, "a file that is written again has another version")
                time.sleep(_MOMENT)

    def test_a_scan_leaves_out_a_file_that_is_deleted_meanwhile(self, backend: Backend) -> None:
        def change() -> None:
            for number in range(200):
                self.put(backend, {f"data/{number % 10}": b"short"})
                backend.delete(f"data/{(number + 5) % 10}")

        self.put(backend, FILES)
        for _ in _while_running(change):
            found = backend.scan("data").keys() & set(backend.list("data"))
            require("data/b/2" in found, "list and scan find the files that stay")

    def test_delete_removes_one_file(self, backend: Backend) -> None:
        self.put(backend, FILES)
        for path in ("data/b/2", "data/absent", "absent/absent"):
            backend.delete(path)
        expected = [path for path in files_below("data") if path != "data/b/2"]
        require(backend.list("data") == expected, "delete removes the file and no other")

    def test_move_replaces_the_target(self, backend: Backend) -> None:
        self.put(backend, FILES)
        backend.move("data/a", "data/b/2")
        backend.move("data/b-1", "new/folder/file")
        require(backend.read("data/b/2") == FILES["data/a"], "move replaces a file at the target")
        require(backend.read("new/folder/file") == FILES["data/b-1"], "move makes the folder")
        require(backend.list("data") == ["data/b/1", "data/b/2"], "move leaves no file behind")

    def test_sync_changes_nothing(self, backend: Backend) -> None:
        self.put(backend, FILES)
        before = backend.list("")
        for folder in FOLDERS:
            backend.sync(folder)
        require(backend.list("") == before, "sync changes no file")

    def test_every_failure_is_a_store_error(self, backend: Backend) -> None:
        def write(path: str) -> None:
            write_atomic(backend, path, b"new")

        self.put(backend, FILES)
        require_error(StoreError, backend.move, "absent", "data/a")
        for action in (
            backend.read,
            backend.size,
            backend.delete,
            backend.list,
            backend.scan,
            write,
        ):
            for path in ("data", "top/below"):
                # A medium without folders may allow what a file system refuses.
                with contextlib.suppress(StoreError):
                    action(path)
        for path, data in FILES.items():
            require(backend.read(path) == data, "a failure changes no other file")

    def test_several_threads_write_at_once(self, backend: Backend) -> None:
        def work(number: int) -> None:
            data = bytes([number]) * 1000
            for _ in range(5):
                self.put(backend, {f"data/{number}": data, "data/all": data})
                require(backend.read(f"data/{number}") == data, "a thread reads what it wrote")

        run_in_threads(8, work)
        require(len(set(backend.read("data/all"))) == 1, "a file is written by one thread")
        require(len(backend.list("data")) == 9, "the files of all threads are there")

    def test_shared_owners_hold_the_lock_together(self, backend: Backend) -> None:
        with backend.lock(shared=True, purpose="save"), _owner(backend, shared=True) as held:
            require(held.wait(_PATIENCE), "two shared owners hold the lock at once")

    def test_an_exclusive_owner_is_alone(self, backend: Backend) -> None:
        for mine, theirs in ((False, False), (False, True), (True, False)):
            with contextlib.ExitStack() as stack:
                with backend.lock(shared=mine, purpose="gc"):
                    held = stack.enter_context(_owner(backend, shared=theirs))
                    require(not held.wait(_MOMENT), "an exclusive owner holds the lock alone")
                require(held.wait(_PATIENCE), "the next owner gets a released lock")

    def test_a_thread_keeps_its_mode_when_it_takes_the_lock_again(self, backend: Backend) -> None:
        with contextlib.ExitStack() as stack:
            with backend.lock(shared=False, purpose="gc"):
                with backend.lock(shared=True, purpose="pin"):
                    held = stack.enter_context(_owner(backend, shared=True))
                    require(not held.wait(_MOMENT), "the thread stays the exclusive owner")
                require(not held.wait(_MOMENT), "the inner context does not release the lock")
            require(held.wait(_PATIENCE), "the outer context releases the lock")

    def test_locks_are_listed_and_a_living_owner_keeps_its_lock(self, backend: Backend) -> None:
        with backend.lock(shared=True, purpose="save"):
            require(not backend.unlock(force=False), "unlock spares the lock of a living owner")
            found = [(lock.purpose, lock.shared) for lock in backend.locks()]
            require(found == [("save", True)], "locks returns the purpose and mode of each lock")
        require(not backend.locks(), "a released lock is not listed")

    def test_an_owner_whose_lock_was_taken_away_changes_nothing(self, backend: Backend) -> None:
        self.put(backend, FILES)
        with backend.lock(shared=False, purpose="gc"):
            require(len(backend.unlock(force=True)) == 1, "unlock returns the removed locks")
            require_error(BusyError, backend.delete, "data/a")
            require_error(BusyError, backend.move, "data/a", "data/moved")
            require_error(BusyError, write_atomic, backend, "data/new", b"new")
        require(
            backend.list("data") == list(files_below("data")), "an owner without lock does nothing"
        )

    def test_a_claim_is_held_by_one_process(self, backend: Backend) -> None:
        with _claimed_by_a_child(backend):
            require_error(BusyError, backend.claim, "timeline", "contract")
            backend.claim("timeline", "another").end()
        mine, again = (backend.claim("timeline", "contract") for _ in range(2))
        mine.leave()
        again.end()

    def test_a_store_survives_a_fault_at_every_operation(self, backend: Backend) -> None:
        require(check_faults(backend) > 0, "faults are injected")


def _while_running(action: Callable[[], None]) -> Iterator[None]:
    """Yield again and again while an action runs in another thread, and at least once."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(action)
        yield
        while not running.done():
            yield
        running.result()


@contextlib.contextmanager
def _owner(backend: Backend, *, shared: bool) -> Iterator[threading.Event]:
    """Request the lock in another thread; yield an event that is set once the thread holds it."""
    held, done = threading.Event(), threading.Event()

    def own() -> None:
        with backend.lock(shared=shared, purpose="other"):
            held.set()
            done.wait(_PATIENCE)

    thread = threading.Thread(target=own, daemon=True)
    thread.start()
    yield held
    done.set()
    thread.join(_PATIENCE)


@contextlib.contextmanager
def _claimed_by_a_child(backend: Backend) -> Iterator[None]:
    """Let a forked child claim first, because a child may share the claims of its parent."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            claim = backend.claim("timeline", "contract")
            os.write(writing, b"1")
            signal.pause()
            claim.end()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        require(os.read(reading, 1), "a process gets a claim that nobody has")
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
