"""No write takes a store's directory beyond its limit."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from msft_store import OutOfSpaceError, OverBudgetError
from msft_store.storage.backend import LocalBackend
from msft_store.storage.quota import QuotaBackend
from tests.support.quota import bytes_on_disk


class SmallDisk(LocalBackend):
    """A folder on a disk with a given number of free bytes."""

    def free_bytes(self) -> int | None:
        return 100


@pytest.fixture
def backend(tmp_path: Path) -> QuotaBackend:
    (tmp_path / "there").write_bytes(bytes(100))
    return QuotaBackend(LocalBackend(tmp_path))


def put(backend: QuotaBackend, path: str, *sizes: int) -> None:
    with backend.writer() as writer:
        for size in sizes:
            writer.write(bytes(size))
        writer.finalize(path)


def test_all_files_count(backend: QuotaBackend, tmp_path: Path) -> None:
    with backend.limit(160):
        put(backend, "one", 30, 20)
        with pytest.raises(OverBudgetError, match=r"11 B more do not fit.*150 B of.*160 B"):
            put(backend, "two", 11)
        put(backend, "two", 10)
    assert bytes_on_disk(tmp_path) == 160


def test_a_refused_write_writes_nothing_and_a_file_counts_while_it_is_open(
    backend: QuotaBackend, tmp_path: Path
) -> None:
    with backend.limit(160), backend.writer() as one, backend.writer() as other:
        one.write(bytes(40))
        with pytest.raises(OverBudgetError):
            other.write(bytes(21))
        assert other.position == 0
        other.write(bytes(20))
        one.finalize("one")
    assert bytes_on_disk(tmp_path) == 140


def test_a_replacement_needs_room_beside_the_file(backend: QuotaBackend) -> None:
    with backend.limit(199), pytest.raises(OverBudgetError):
        put(backend, "there", 100)
    with backend.limit(200):
        put(backend, "there", 100)
        put(backend, "there", 50)


def test_a_limit_is_for_one_thread_and_ends(backend: QuotaBackend) -> None:
    with backend.limit(100):
        other = threading.Thread(target=put, args=(backend, "one", 30))
        other.start()
        other.join()
        assert backend.size("one") == 30
        with backend.limit(None):
            put(backend, "two", 30)
        with pytest.raises(OverBudgetError):
            put(backend, "three", 1)
    put(backend, "three", 1)


def test_a_reserve_stays_free(backend: QuotaBackend) -> None:
    with backend.limit(160, reserve=20):
        put(backend, "one", 40)
        with pytest.raises(OverBudgetError, match="20 B of which are kept"):
            put(backend, "two", 1)


def test_bytes_that_cannot_fit_are_refused_beforehand(
    backend: QuotaBackend, tmp_path: Path
) -> None:
    backend.require_space(1 << 20)
    with backend.limit(160):
        backend.require_space(60)
        with pytest.raises(OverBudgetError):
            backend.require_space(61)
    with pytest.raises(OutOfSpaceError, match=r"101 B more do not fit .*: 100 B are free"):
        QuotaBackend(SmallDisk(tmp_path)).require_space(101)


def test_blocks_that_are_reserved_for_root_are_not_free(
    backend: QuotaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(f_blocks=100, f_bfree=50, f_bavail=2, f_frsize=10)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    backend.require_space(20)
    with pytest.raises(OutOfSpaceError, match="20 B are free"):
        backend.require_space(21)
