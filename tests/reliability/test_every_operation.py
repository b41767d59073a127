"""Whatever operation fails, or is the last one before a kill: nothing that existed is lost."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from msft_store import KeepBest, KeepLast, OutOfSpaceError, StorageError, Store, Timeline
from msft_store.backend import LocalBackend
from tests.support.faults import CHANGES, EVERYTHING, FaultyBackend, Stopped
from tests.support.invariants import assert_tidied, assert_whole
from tests.support.ledger import Ledger
from tests.support.states import State, same_bits, train_step, write_base

RETENTION = KeepLast(1) | KeepBest("score", 1)


def tiny_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.02 * torch.randn(24, 32, generator=generator)).bfloat16()
        for name in ("a.weight", "b.weight")
    }


@dataclass(frozen=True)
class Prepared:
    """A store on disk with everything in it, and what it must never lose."""

    root: Path
    states: Mapping[str, State]
    """By id, what was committed and is not given up by any operation under test."""
    droppable: Mapping[str, State]
    ids: Mapping[str, str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Chains with an anchor, a timeline on its second branch, and dead, shared and held chunks."""
    folder = tmp_path_factory.mktemp("prepared")
    store = Store.create(folder / "store")
    start = tiny_state()
    base = store.add_base(write_base(folder / "base.safetensors", start))
    write_base(folder / "other.safetensors", tiny_state(5))
    first = train_step(start, 0.3, 1)
    # Keeping one tensor of `gone` alive makes its pack partly dead.
    gone = train_step(start, 0.3, 2)
    heir = {"a.weight": gone["a.weight"], "b.weight": first["b.weight"]}
    below = train_step(first, 0.05, 3)
    anchor = store.save(first, parent=base, step=1)
    lost = store.save(gone, parent=base, step=2)
    kept = store.save(heir, parent=base, step=3)
    child = store.save(below, parent=anchor, step=4)
    held = store.save(train_step(start, 0.3, 4), parent=base, step=5)
    on_held = store.save(train_step(store.load(held), 0.05, 5), parent=held, step=6)
    on_held_state = store.load(on_held)
    store.pin(kept, "kept")
    line = Timeline(store, base, retention=RETENTION, name="run")
    commits = []
    for step in range(3):
        state = train_step(start, 0.2, 10 + step)
        score = [0.5, 0.9, 0.1][step]
        commits.append((line.commit(state, step=step, metrics={"score": score}), state))
    line.rollback(commits[1][0])
    branch = train_step(commits[1][1], 0.1, 20)
    newest = line.commit(branch, step=9, metrics={"score": 0.2})
    root = commits[1][0]
    store.forget(lost)
    store.forget(held)
    (folder / "store/tmp/0-left").write_bytes(b"of a save that was killed")
    return Prepared(
        root=folder,
        states={anchor.id: first, kept.id: heir, root.id: commits[1][1], on_held.id: on_held_state},
        droppable={child.id: below, newest.id: branch},
        ids={"anchor": anchor.id, "child": child.id, "root": root.id, "newest": newest.id},
    )


Operation = Callable[[Store, Prepared], None]


def save(store: Store, prepared: Prepared) -> None:
    state = train_step(prepared.states[prepared.ids["anchor"]], 0.05, 30)
    ckpt = store.save(state, parent=prepared.ids["anchor"], step=30)
    assert same_bits(store.load(ckpt), state)


def pin(store: Store, prepared: Prepared) -> None:
    store.pin(prepared.ids["anchor"], "kept")
    assert store.refs()["kept"] == prepared.ids["anchor"]


def forget(store: Store, prepared: Prepared) -> None:
    if prepared.ids["child"] in {ckpt.id for ckpt in store.log()}:
        store.forget(prepared.ids["child"])
    assert prepared.ids["child"] not in {ckpt.id for ckpt in store.log()}


def anchor(store: Store, prepared: Prepared) -> None:
    store.anchor(prepared.ids["child"])
    assert same_bits(store.load(prepared.ids["child"]), prepared.droppable[prepared.ids["child"]])


def rebase(store: Store, prepared: Prepared) -> None:
    onto = store.anchor(prepared.ids["root"])
    for ckpt in store.log():
        if ckpt.base == onto.base:
            store.rebase(ckpt, onto)
    store.plan_gc().execute()


def gc(store: Store, prepared: Prepared) -> None:
    store.plan_gc().execute()
    assert store.plan_gc().freed_bytes == 0


def gc_with_policy(store: Store, prepared: Prepared) -> None:
    for name, identity in zip("xyz", prepared.states, strict=False):
        store.pin(identity, name)
    store.pin(list(prepared.states)[-1], "last")
    store.plan_gc(KeepLast(1)).execute()
    assert prepared.ids["child"] not in {ckpt.id for ckpt in store.log()}


def add_base(store: Store, prepared: Prepared) -> None:
    base = store.add_base(prepared.root / "other.safetensors")
    assert store.save(tiny_state(5), parent=base).stored_bytes == 0


def commit(store: Store, prepared: Prepared) -> None:
    line = Timeline(store, None, retention=RETENTION, name="run")
    assert line.root is not None
    assert line.root.id == prepared.ids["root"]
    state = train_step(prepared.states[prepared.ids["root"]], 0.05, 40)
    ckpt = line.commit(state, step=40, metrics={"score": 0.3})
    assert set(line.kept()) == {ckpt.id, prepared.ids["root"]}
    assert same_bits(store.load(ckpt), state)
    assert {prepared.ids["root"], ckpt.id} == set(
        refs_of(store) & {c.id for c in store.log() if "timeline" in c.metadata}
    )


def rollback(store: Store, prepared: Prepared) -> None:
    line = Timeline(store, None, retention=RETENTION, name="run")
    root = prepared.ids["root"]
    assert same_bits(line.rollback(root), prepared.states[root])
    assert line.root is not None
    assert line.root.id == root
    assert set(line.kept()) == {root} | {c for c in line.kept() if c == prepared.ids["newest"]}


def refs_of(store: Store) -> set[str]:
    """Return what the timeline's refs point to."""
    return {ident for name, ident in store.refs().items() if name.startswith("timelines/run/")}


FAILURES: dict[str, tuple[type[BaseException], frozenset[str]]] = {
    "error": (StorageError, EVERYTHING),
    "no space": (OutOfSpaceError, CHANGES),
    "stop": (Stopped, CHANGES),
}
OPERATIONS = [save, pin, forget, anchor, rebase, gc, gc_with_policy, add_base, commit, rollback]


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("failure", FAILURES)
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
        if path.is_file() and path.name != "lock"
    )


def what_is_in(path: Path) -> bytes | int:
    """Return the content of a ref, the size of any other file."""
    return path.read_bytes() if "refs" in path.parts else path.stat().st_size
