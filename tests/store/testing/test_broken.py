"""Every test of a contract fails for a backend or remote that breaks its promise."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from msft_store import StorageError
from msft_store.remote.transport.directory import DirectoryRemote
from msft_store.storage.backend import FileStat, LocalBackend, Writer, write_atomic
from msft_store.storage.claims import Claim
from msft_store.testing import BackendContract, RemoteContract, backends

BROKEN: dict[str, type] = {}
"""A broken backend or remote for each test of the contracts, by contract and test."""


def breaks(promise: Callable[..., None]) -> Callable[[type], type]:
    """Register a class that breaks the promise of a test."""

    def register(broken: type) -> type:
        BROKEN[promise.__qualname__.replace("ReadContract", "BackendContract")] = broken
        return broken

    return register


def promises(contract: type) -> list[str]:
    """Return the names of the tests of a contract."""
    found = inspect.getmembers(contract, inspect.isfunction)
    return [f"{contract.__name__}.{name}" for name, _ in found if name.startswith("test_")]


@pytest.mark.parametrize("promise", promises(BackendContract) + promises(RemoteContract))
def test_each_promise_can_be_broken(
    promise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_PATIENCE", 1.0)
    contract, name = promise.split(".")
    test = getattr((BackendContract if contract == "BackendContract" else RemoteContract)(), name)
    broken = BROKEN[promise](tmp_path / "place")
    broken.make_root()
    given = [tmp_path] if "tmp_path" in inspect.signature(test).parameters else []
    with pytest.raises((AssertionError, StorageError, ValueError, BrokenError)):
        test(broken, *given)


class BrokenError(Exception):
    """Raised by a backend that refuses what it must do."""


class WrappedWriter(Writer):
    """Another writer, on which the broken ones are built."""

    def __init__(self, inner: Writer) -> None:
        self.inner = inner

    @property
    def position(self) -> int:
        return self.inner.position

    def write(self, data: bytes | memoryview) -> None:
        self.inner.write(data)

    def finalize(self, path: str) -> None:
        self.inner.finalize(path)


@breaks(BackendContract.test_describe_contains_the_path)
class Nameless(LocalBackend):
    def describe(self, path: str) -> str:
        return "the store"


@breaks(BackendContract.test_exists_is_true_for_files_only)
class CountsFolders(LocalBackend):
    def exists(self, path: str) -> bool:
        return (self.root / path).exists()


@breaks(BackendContract.test_read_returns_any_range)
class EndsForLength(LocalBackend):
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return super().read(path)[offset:length]


@breaks(BackendContract.test_an_absent_file_raises_a_storage_error)
class AbsentIsEmpty(LocalBackend):
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return super().read(path, offset, length) if self.exists(path) else b""


@breaks(BackendContract.test_list_is_sorted_and_complete)
class ListsByFolder(LocalBackend):
    def list(self, folder: str) -> list[str]:
        return sorted(super().list(folder), key=lambda path: path.split("/"))


@breaks(BackendContract.test_scan_and_size_agree_with_list)
class SkipsEmptyFiles(LocalBackend):
    def scan(self, folder: str) -> dict[str, FileStat]:
        return {path: stat for path, stat in super().scan(folder).items() if stat.size}


@breaks(BackendContract.test_several_threads_read_at_once)
class SharesItsPlace(LocalBackend):
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        self.place = path
        time.sleep(0.001)
        return super().read(self.place, offset, length)


@breaks(BackendContract.test_a_file_is_visible_once_it_is_finalized)
class KeepsBuffers(LocalBackend):
    class Buffered(WrappedWriter):
        def __init__(self, inner: Writer) -> None:
            super().__init__(inner)
            self.parts: list[bytes | memoryview] = []

        @property
        def position(self) -> int:
            return sum(map(len, self.parts))

        def write(self, data: bytes | memoryview) -> None:
            self.parts.append(data)

        def finalize(self, path: str) -> None:
            for part in self.parts:
                self.inner.write(part)
            self.inner.finalize(path)

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        with super().writer() as inner:
            yield self.Buffered(inner)


@breaks(BackendContract.test_a_writer_that_is_left_discards_its_file)
class LeavesFiles(LocalBackend):
    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        manager = super().writer()
        with contextlib.suppress(ZeroDivisionError):
            yield manager.__enter__()
            manager.__exit__(None, None, None)
        self.left = manager


@breaks(BackendContract.test_finalize_replaces_a_file_atomically)
class DeletesFirst(LocalBackend):
    class Late(WrappedWriter):
        backend: LocalBackend

        def finalize(self, path: str) -> None:
            self.backend.delete(path)
            time.sleep(0.01)
            self.inner.finalize(path)

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        with super().writer() as inner:
            late = self.Late(inner)
            late.backend = self
            yield late


@breaks(BackendContract.test_a_version_changes_when_the_file_is_written)
class VersionIsSize(LocalBackend):
    def scan(self, folder: str) -> dict[str, FileStat]:
        return {path: FileStat(one.size, one.size) for path, one in super().scan(folder).items()}


@breaks(BackendContract.test_a_scan_leaves_out_a_file_that_is_deleted_meanwhile)
class ScansSlowly(LocalBackend):
    def scan(self, folder: str) -> dict[str, FileStat]:
        paths = self.list(folder)
        time.sleep(0.02)
        return {path: FileStat(self.size(path)) for path in paths}


@breaks(BackendContract.test_delete_removes_one_file)
class DeletesWhatIsThere(LocalBackend):
    def delete(self, path: str) -> None:
        if not self.exists(path):
            raise BrokenError
        super().delete(path)


@breaks(BackendContract.test_move_replaces_the_target)
class Copies(LocalBackend):
    def move(self, path: str, target: str) -> None:
        write_atomic(self, target, self.read(path))


@breaks(BackendContract.test_sync_changes_nothing)
class SyncsWhatIsThere(LocalBackend):
    def sync(self, folder: str) -> None:
        if not self.list(folder):
            raise BrokenError


@breaks(BackendContract.test_every_failure_is_a_store_error)
class RaisesItsOwnErrors(LocalBackend):
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return super().read(path, offset, length)
        except StorageError as error:
            raise BrokenError from error


@breaks(BackendContract.test_several_threads_write_at_once)
class HasOneWriter(LocalBackend):
    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        with super().writer() as self.only:
            yield self.only_writer()

    def only_writer(self) -> Writer:
        time.sleep(0.001)
        return self.only


@breaks(BackendContract.test_shared_owners_hold_the_lock_together)
class SharesNoLock(LocalBackend):
    @contextlib.contextmanager
    def lock(self, *, shared: bool, purpose: str) -> Iterator[None]:
        with super().lock(shared=False, purpose=purpose):
            yield


@breaks(BackendContract.test_an_exclusive_owner_is_alone)
class ExcludesNobody(LocalBackend):
    @contextlib.contextmanager
    def lock(self, *, shared: bool, purpose: str) -> Iterator[None]:
        with super().lock(shared=True, purpose=purpose):
            yield


@breaks(BackendContract.test_a_thread_keeps_its_mode_when_it_takes_the_lock_again)
class ReleasesEverything(LocalBackend):
    @contextlib.contextmanager
    def lock(self, *, shared: bool, purpose: str) -> Iterator[None]:
        with super().lock(shared=shared, purpose=purpose):
            yield
        self.unlock(force=True)


@breaks(BackendContract.test_locks_are_listed_and_a_living_owner_keeps_its_lock)
class UnlocksTheLiving(LocalBackend):
    def unlock(self, *, force: bool) -> Any:
        return super().unlock(force=True)


@breaks(BackendContract.test_an_owner_whose_lock_was_taken_away_changes_nothing)
class ForgetsItsLock(LocalBackend):
    def delete(self, path: str) -> None:
        (self.root / path).unlink()


@breaks(BackendContract.test_a_claim_is_held_by_one_process)
class ClaimsNothing(LocalBackend):
    def claim(self, kind: str, name: str) -> Claim:
        return Claim()


@breaks(BackendContract.test_a_store_survives_a_fault_at_every_operation)
class DeletesNothing(LocalBackend):
    def delete(self, path: str) -> None:
        pass


class Directory(DirectoryRemote):
    """A remote on which the broken ones are built."""

    workers = 4

    def make_root(self) -> None:
        self.backend.make_root()


@breaks(RemoteContract.test_describe_contains_the_path)
class NamelessRemote(Directory):
    def describe(self, path: str) -> str:
        return "the remote"


@breaks(RemoteContract.test_several_threads_use_it_at_once)
class SharesItsPath(Directory):
    def put(self, path: str, parts: Any, size: int) -> None:
        self.place = path
        time.sleep(0.01)
        super().put(self.place, parts, size)


@breaks(RemoteContract.test_sizes_has_all_files_below_a_folder)
class MatchesPrefixes(Directory):
    def sizes(self, folder: str) -> dict[str, int]:
        return {p: size for p, size in super().sizes("").items() if p.startswith(folder)}


@breaks(RemoteContract.test_read_returns_any_range_or_raises)
class ReadsLess(Directory):
    def read(self, path: str, offset: int, length: int) -> bytes:
        return self.backend.read(path, offset, length)


@breaks(RemoteContract.test_an_absent_file_is_reported)
class AbsentHasSizeZero(Directory):
    def size(self, path: str) -> int | None:
        return super().size(path) or 0


@breaks(RemoteContract.test_read_versioned_returns_a_file_up_to_a_size)
class ReadsAnySize(Directory):
    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        return super().read_versioned(path, 1 << 40)


@breaks(RemoteContract.test_put_writes_a_file_of_any_size)
class SendsInAnyOrder(Directory):
    def put(self, path: str, parts: Any, size: int) -> None:
        super().put(path, lambda: sorted(parts(), reverse=True), size)


@breaks(RemoteContract.test_an_interrupted_put_changes_nothing)
class WritesInPlace(Directory):
    def put(self, path: str, parts: Any, size: int) -> None:
        target = self.backend.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.writelines(parts())


@breaks(RemoteContract.test_create_writes_a_new_file_only)
class CreatesAgain(Directory):
    def create(self, path: str, data: bytes) -> bool:
        write_atomic(self.backend, path, data)
        return True


@breaks(RemoteContract.test_replace_needs_the_present_version)
class IgnoresVersions(Directory):
    def replace(self, path: str, data: bytes, version: Any) -> bool:
        return not write_atomic(self.backend, path, data)


@breaks(RemoteContract.test_one_of_several_writers_wins)
class LooksAndWrites(Directory):
    def create(self, path: str, data: bytes) -> bool:
        there = self.backend.exists(path)
        time.sleep(0.01)
        return not there and not write_atomic(self.backend, path, data)


@breaks(RemoteContract.test_every_failure_is_a_store_error)
class RemoteRaisesItsOwnErrors(Directory):
    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        if (self.backend.root / path).is_dir():
            raise BrokenError
        return super().read_versioned(path, most)


@breaks(RemoteContract.test_a_store_is_pushed_read_in_place_and_cloned)
class LosesManifests(Directory):
    def sizes(self, folder: str) -> dict[str, int]:
        return {} if folder == "manifests" else super().sizes(folder)
