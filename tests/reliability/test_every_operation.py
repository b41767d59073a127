"""Whatever operation fails, or is the last one before a kill: nothing that existed is lost."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path

import pytest

from msft_store import OutOfSpaceError, StorageError, Store
from msft_store.backend import LocalBackend
from tests.support.faults import CHANGES, EVERYTHING, FaultyBackend, Stopped
from tests.support.invariants import assert_tidied, assert_whole
from tests.support.ledger import Ledger
from tests.support.operations import OPERATIONS, Operation, Prepared, export

FAILURES: dict[str, tuple[type[BaseException], frozenset[str]]] = {
    "error": (StorageError, EVERYTHING),
    "no space": (OutOfSpaceError, CHANGES),
    "stop": (Stopped, CHANGES),
}
CASES = [
    pytest.param(failure, operation, id=f"{failure}-{operation.__name__}")
    for failure, (_, kinds) in FAILURES.items()
    for operation in OPERATIONS
    # Exporting changes nothing in the store.
    if operation is not export or kinds == EVERYTHING
]


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize(("failure", "operation"), CASES)
def test_every_operation_may_fail(
    tmp_path: Path, prepared: Prepared, faults: Ledger, operation: Operation, failure: str
) -> None:
    error, kinds = FAILURES[failure]
    verified = set()
    pristine, root = snapshot(prepared.root / "store"), tmp_path / "store"
    # Where reads may fail too there are hundreds of operations; of the later ones every 11th.
    for n in itertools.chain(range(30), itertools.count(30, 11)):
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
    """Return what a crash left, without names and times that differ each time."""
    return frozenset(
        ("tmp" if path.parent.name == "tmp" else str(path.relative_to(root)), what_is_in(path))
        for path in root.rglob("*")
        if path.is_file()
    )


def what_is_in(path: Path) -> bytes | int:
    """Return the content of a ref, the size of any other file."""
    return path.read_bytes() if "refs" in path.parts else path.stat().st_size
