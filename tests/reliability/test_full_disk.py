"""A full disk at every write: a clear error, no damage, no leftovers, and success with space."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msft_store import OutOfSpaceError, Store
from tests.support.invariants import assert_tidied, assert_whole
from tests.support.ledger import Ledger
from tests.support.operations import OPERATIONS, Operation, Prepared, gc, prepare, save
from tests.support.quota import QuotaBackend, bytes_on_disk

LARGE = 1 << 20
CALLS = {"fsync": os.fsync, "replace": os.replace, "mkdir": os.mkdir}
LEFT = {"0-left"}
"""The temporary files of the prepared store."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"))


def after_failure(store: Store, prepared: Prepared, error: OutOfSpaceError) -> None:
    """Assert that an operation without space raised the error and left no files."""
    assert re.search("no space left to|more do not fit on the disk", str(error))
    assert {path.name for path in Path(store.path, "tmp").glob("*")} <= LEFT
    assert_whole(store, prepared.states, prepared.droppable)


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_every_size_of_disk(
    tmp_path: Path, prepared: Prepared, faults: Ledger, operation: Operation
) -> None:
    """The quota grows by the bytes that the refused write lacked, so each write is refused once."""
    root, quota = tmp_path / "store", bytes_on_disk(prepared.root / "store")
    shutil.copytree(prepared.root / "store", root)
    for _ in range(200):
        disk = QuotaBackend(root, quota=quota)
        store = Store(disk)
        error = None
        with faults.inject("a full disk at a write"):
            with contextlib.suppress(OutOfSpaceError):
                try:
                    operation(store, prepared)
                except OutOfSpaceError as raised:
                    error = raised
                    raise
            assert disk.largest <= max(quota, bytes_on_disk(prepared.root / "store"))
            if error is not None:
                assert re.search(r"\d+ (more )?bytes|\d+(\.\d)? k?B", str(error))
                after_failure(Store.open(root), prepared, error)
            disk.quota = 1 << 60
            # The same object goes on, and so does another one.
            operation(store, prepared)
            operation(Store.open(root), prepared)
            assert_tidied(Store.open(root), prepared.states, prepared.droppable)
        shutil.rmtree(root.parent / "exported", ignore_errors=True)
        shutil.rmtree(root)
        shutil.copytree(prepared.root / "store", root)
        if not disk.lacked:
            return
        quota += disk.lacked
    raise AssertionError("it never had enough")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_the_system_that_needs_room(
    *,
    tmp_path: Path,
    prepared: Prepared,
    faults: Ledger,
    soak: bool,
    operation: Operation,
    name: str,
) -> None:
    """The disk is full when a file is synced, renamed or created."""
    for at in itertools.count(step=1 if soak else 4):
        shutil.rmtree(tmp_path)
        shutil.copytree(prepared.root / "store", tmp_path / "store")
        store = Store.open(tmp_path / "store")
        with faults.inject(f"a full disk at {name}"):
            with pytest.MonkeyPatch.context() as patch:
                calls = fail_from(patch, name, at, tmp_path)
                error = None
                try:
                    operation(store, prepared)
                except OutOfSpaceError as raised:
                    error = raised
            if error is not None:
                assert "make room" in str(error)
                after_failure(Store.open(tmp_path / "store"), prepared, error)
            operation(store, prepared)
            assert_tidied(Store.open(tmp_path / "store"), prepared.states, prepared.droppable)
        if len(calls) <= at:
            return


def fail_from(patch: pytest.MonkeyPatch, name: str, at: int, below: Path) -> list[str]:
    """Let the calls of a function fail from number ``at`` on; return the list of calls."""
    calls: list[str] = []

    def call(target: Any, *more: Any, **keywords: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        # A lock is an empty file: it takes a name and no room.
        if path.startswith(str(below)) and "/locks" not in path:
            calls.append(path)
            if len(calls) > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return CALLS[name](target, *more, **keywords)

    patch.setattr(os, name, call)
    return calls


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of a megabyte."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


def may_mount() -> bool:
    """Return whether this user may mount a file system here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder, "disk")):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


if may_mount():  # only root may, and not in every container

    @pytest.mark.parametrize("room", [0, 4096, 12_288])
    def test_a_real_disk_that_is_full(
        tmp_path: Path, prepared: Prepared, faults: Ledger, room: int
    ) -> None:
        """On a completely full disk gc still works, because it frees space."""
        with small_disk(tmp_path / "disk") as disk, faults.inject("a real disk that is full"):
            root = disk / "store"
            shutil.copytree(prepared.root / "store", root)
            filler = disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
            store = Store.open(root)
            if room == 0:
                with pytest.raises(OutOfSpaceError) as raised:
                    save(store, prepared)
                after_failure(Store.open(root), prepared, raised.value)
            gc(store, prepared)
            assert shutil.disk_usage(disk).free > room
            assert_whole(store, prepared.states, prepared.droppable)
            filler.unlink()
            save(store, prepared)
            assert_tidied(Store.open(root), prepared.states, prepared.droppable)
