"""The invariants of a store, which hold at every moment and after every fault.

Example::

    assert_whole(Store.open(path), {ckpt.id: state})
    assert_tidied(Store.open(path), {ckpt.id: state})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msft_store import Store
from tests.support.states import State, same_bits

Committed = Mapping[str, State]
"""Tensors by checkpoint id."""


def assert_whole(
    store: Store, committed: Committed, possible: Committed | None = None, *, data: bool = True
) -> None:
    """Assert that everything committed is there to the last bit, and that nothing is damaged.

    What is ``possible`` may be there, and is exact then; other checkpoints have to be readable.
    With ``data`` every tensor is loaded and every chunk decoded.
    """
    known = {ckpt.id for ckpt in store.log()}
    assert committed.keys() <= known, f"lost: {sorted(committed.keys() - known)}"
    assert set(store.refs().values()) <= known, "a ref points to what is not there"
    if data:
        for identity, state in {**(possible or {}), **committed}.items():
            if identity in known:
                assert same_bits(store.load(identity), state), f"{identity} is not what was saved"
    findings = store.check(read_data=data)
    assert findings == [], findings


def assert_tidied(store: Store, committed: Committed, possible: Committed | None = None) -> None:
    """Assert that gc deletes all files that a crash leaves, and nothing else."""
    before = {ckpt.id for ckpt in store.log()}
    store.plan_gc().execute()
    assert {ckpt.id for ckpt in store.log()} == before
    assert files(Path(store.path, "tmp")) == {}, "gc left temporary files"
    plan = store.plan_gc()
    assert (plan.delete, plan.rewrite, plan.leftovers) == ((), (), ()), str(plan)
    assert store.stats().on_disk_bytes == sum(files(Path(store.path)).values())
    assert_whole(store, committed, possible)


def files(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of all files below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
