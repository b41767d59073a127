"""No checkpoint is lost when any operation fails or is the last one before a kill."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from msft_store import OutOfSpaceError, StorageError, Store, StoreError
from msft_store.storage.backend import LocalBackend
from msft_store.testing import ALL_OPERATIONS, WRITE_OPERATIONS, FaultyBackend, SimulatedKill
from tests.support.invariants import assert_tidied, assert_whole
from tests.support.ledger import Ledger
from tests.support.operations import OPERATIONS, Operation, Prepared, export

FAILURES: dict[str, tuple[type[BaseException], frozenset[str]]] = {
    "error": (StorageError, ALL_OPERATIONS),
    "no space": (OutOfSpaceError, WRITE_OPERATIONS),
    "stop": (SimulatedKill, WRITE_OPERATIONS),
}
Case = tuple[str, Operation]
CASES = [
    pytest.param((failure, operation), id=f"{failure}-{operation.__name__}")
    for failure, (_, kinds) in FAILURES.items()
    for operation in OPERATIONS
    # Exporting changes nothing in the store.
    if operation is not export or kinds == ALL_OPERATIONS
]


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("case", CASES)
def test_every_operation_may_fail(
    tmp_path: Path, prepared: Prepared, faults: Ledger, case: Case, soak: bool
) -> None:
    failure, operation = case
    error, kinds = FAILURES[failure]
    verified = set()
    pristine, root = snapshot(prepared.root / "store"), tmp_path / "store"
    # Where reads may fail too there are hundreds of operations: in the short form a sample of them.
    dense, every = (200, 3) if soak else (8, 7)
    for n in itertools.chain(range(dense), itertools.count(dense, every)):
        if not root.exists():
            shutil.copytree(prepared.root / "store", root)
        backend = FaultyBackend(LocalBackend(root), error=error, kinds=kinds)
        store = Store(backend)
        backend.arm(n)
        with contextlib.suppress(error):
            operation(store, prepared)
        if not backend.failed:
            break
        backend.disarm()
        left = snapshot(root)
        with faults.inject(f"{failure} at an operation"):
            if n > 0 and left == pristine:
                continue
            if left not in verified:
                verified.add(left)
                assert_whole(Store.open(root), prepared.states, prepared.droppable)
                if failure != "stop":
                    # The same object goes on after an error.
                    operation(store, prepared)
                operation(Store.open(root), prepared)
                assert_tidied(Store.open(root), prepared.states, prepared.droppable)
        shutil.rmtree(root)
    assert n > 0


def snapshot(root: Path) -> frozenset[tuple[str, bytes | int]]:
    """Return the files that a crash left, without names and times that differ each time."""
    return frozenset(
        ("tmp" if path.parent.name == "tmp" else str(path.relative_to(root)), what_is_in(path))
        for path in root.rglob("*")
        if path.is_file()
    )


def what_is_in(path: Path) -> bytes | int:
    """Return the content of a ref, the size of any other file."""
    return path.read_bytes() if "refs" in path.parts else path.stat().st_size


@pytest.mark.parametrize("call", ["pread", "open", "stat"])
def test_a_disk_that_cannot_be_read_is_named(
    tmp_path: Path, prepared: Prepared, faults: Ledger, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    shutil.copytree(prepared.root / "store", tmp_path / "store")
    real = getattr(os, call)

    def broken(target: int | str | os.PathLike[str], *arguments: object, **keywords: object) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if path.endswith(".pack"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(target, *arguments, **keywords)

    with faults.inject("unreadable disk"):
        monkeypatch.setattr(os, call, broken)
        with pytest.raises(StoreError, match=r"packs.*Input/output error"):
            Store.open(tmp_path / "store").load(prepared.ids["anchor"])
        with contextlib.suppress(StoreError):
            Store.open(tmp_path / "store").plan_gc().execute()
        monkeypatch.undo()
        assert_whole(Store.open(tmp_path / "store"), prepared.states, prepared.droppable)
