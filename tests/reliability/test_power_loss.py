"""Power fails at any moment: every committed checkpoint survives, and the others do no harm."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from msft_store import StorageError, Store
from msft_store.testing import SimulatedKill
from tests.support.disk import Disk, Moment, Tree, after_kill, after_power_loss, write_tree
from tests.support.invariants import assert_tidied, assert_whole
from tests.support.ledger import Ledger
from tests.support.operations import OPERATIONS, Operation, Prepared

pytestmark = [
    pytest.mark.usefixtures("without_fsync"),
    pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__),
]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A folder with a store, and the operations on it."""

    prepared: Prepared
    live: Path
    broken: Path
    faults: Ledger
    rng: random.Random
    soak: bool

    def begin(self) -> Store:
        """Open a new and durable store in ``live``."""
        shutil.rmtree(self.live, ignore_errors=True)
        shutil.copytree(self.prepared.root / "store", self.live / "store")
        return self.store()

    def store(self) -> Store:
        return Store.open(self.live / "store")

    def after(self, tree: Tree) -> Store:
        """Open the store that a crash left."""
        write_tree(tree, self.broken)
        return Store.open(self.broken / "store")

    def assert_whole(self, store: Store) -> None:
        assert_whole(store, self.prepared.states, self.prepared.droppable)

    def assert_tidied(self, store: Store) -> None:
        assert_tidied(store, self.prepared.states, self.prepared.droppable)


@pytest.fixture
def scene(tmp_path: Path, prepared: Prepared, faults: Ledger, seed: int, soak: bool) -> Scene:
    return Scene(
        prepared=prepared,
        live=tmp_path / "live",
        broken=tmp_path / "broken",
        faults=faults,
        rng=random.Random(seed),  # noqa: S311
        soak=soak,
    )


def losses(scene: Scene, moments: Sequence[Moment], most: int) -> Iterator[tuple[str, str, Tree]]:
    """Yield a call, a kind of crash right before it, and a different tree that it may leave.

    A sample of ``most``, and all after the last call.
    """
    seen = set()
    found = []
    for moment in moments:
        chances = [after_power_loss(moment, scene.rng) for _ in range(10 if scene.soak else 2)]
        for kind, tree in [
            ("kill at a call", after_kill(moment)),
            ("power loss", after_power_loss(moment, None)),
            *(("power loss", tree) for tree in chances),
        ]:
            key = frozenset(tree.items())
            if key not in seen:
                seen.add(key)
                found.append((moment.call, kind, tree))
    last = [one for one in found if one[0] == "end"]
    yield from [*scene.rng.sample(found, min(most, len(found))), *last]


def contents(store: Store) -> tuple[object, ...]:
    """Return all that a store lists."""
    sizes = {ckpt.id: ckpt.stored_bytes for ckpt in store.log()}
    return sizes, store.refs(), store.notes(), sorted(base.id for base in store.bases())


def test_power_may_fail_at_any_moment(scene: Scene, operation: Operation) -> None:
    store = scene.begin()
    with Disk(scene.live) as disk:
        operation(store, scene.prepared)
    outcome = contents(scene.store())
    for call, kind, tree in losses(scene, disk.moments, 200 if scene.soak else 8):
        with scene.faults.inject(kind):
            broken = scene.after(tree)
            scene.assert_whole(broken)
            if call == "end":
                assert contents(broken) == outcome
            operation(broken, scene.prepared)
            scene.assert_tidied(broken)


def test_power_may_fail_after_a_killed_operation_was_repeated(
    scene: Scene, operation: Operation
) -> None:
    """A process builds on files that the process before it left visible but not durable."""
    every = 1 if scene.soak else 6
    for n in itertools.count(scene.rng.randrange(every), every):
        store = scene.begin()
        with Disk(scene.live) as disk:
            disk.stop(n)
            with contextlib.suppress(SimulatedKill):
                operation(store, scene.prepared)
            if not disk.failed:
                break
            disk.stop_faults()
            killed = len(disk.moments)
            operation(scene.store(), scene.prepared)
        outcome = contents(scene.store())
        made_up = disk.moments[killed:]
        for call, kind, tree in losses(scene, made_up, 20 if scene.soak else 2):
            with scene.faults.inject(f"{kind} after a kill"):
                broken = scene.after(tree)
                scene.assert_whole(broken)
                # A repetition that changed nothing made no promise, so it is not compared.
                if call == "end" and len(made_up) > 1:
                    assert contents(broken) == outcome


def test_any_call_may_fail(scene: Scene, operation: Operation) -> None:
    """A file whose fsync failed is not used, and a failed call is not reported as a success."""
    every = 1 if scene.soak else 2
    for n in itertools.count(scene.rng.randrange(every), every):
        store = scene.begin()
        with Disk(scene.live) as disk:
            disk.fail(n)
            with contextlib.suppress(StorageError):
                operation(store, scene.prepared)
        if not disk.failed:
            break
        with scene.faults.inject(f"failing {disk.failed}"):
            scene.assert_whole(scene.store())
            operation(store, scene.prepared)
            if scene.soak:
                operation(scene.store(), scene.prepared)
            scene.assert_tidied(scene.store())
