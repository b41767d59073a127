"""Processes that share stores, and some that are killed or suspended with a lock."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msft_store import BusyError, Store
from msft_store.storage.backend import LocalBackend, Writer
from msft_store.storage.lock_files import Process
from msft_store.storage.locks import Locks
from tests.support import contenders
from tests.support.children import LONG, begin, end_of, ended
from tests.support.contenders import Record, arena, base_of, content
from tests.support.invariants import assert_tidied, assert_whole
from tests.support.ledger import Ledger
from tests.support.owners import silence

WRITERS = (contenders.save, contenders.save, contenders.commit, contenders.commit)


@pytest.mark.usefixtures("without_fsync")
def test_saving_committing_collecting_and_reading_at_once(
    tmp_path: Path, faults: Ledger, soak: bool, seed: int
) -> None:
    rounds = 100 if soak else 12
    stop = tmp_path / "stop"
    # Two stores on one base.
    roots = [arena(tmp_path / name, tmp_path / "base.safetensors") for name in ("one", "two")]
    records = {root: [] for root in roots}
    writing, others = [], []
    with contextlib.ExitStack() as counted:
        for root in roots:
            actions: list[Callable[[], int]] = []
            for number, work in enumerate(WRITERS[: len(WRITERS) if root is roots[0] else 2]):
                record = Record(tmp_path / f"{root.name}-{number}")
                records[root].append(record)
                actions.append(functools.partial(work, root, record, 1 + number, rounds))
            writing += [begin(action) for action in actions]
            others.append(begin(lambda root=root: contenders.collect(root, stop)))
            others += [
                begin(lambda root=root, n=n: contenders.read(root, stop, seed + n))
                for n in range(2 if root is roots[0] else 1)
            ]
        for _ in writing + others:
            counted.enter_context(faults.inject("process that contends for a store"))
        outcomes = []
        try:
            outcomes += [end_of(child, 5 * LONG) for child in writing]
        finally:
            stop.touch()
            outcomes += [end_of(child) for child in others]
        assert set(outcomes) == {0}
        for root in roots:
            committed = {k: v for record in records[root] for k, v in record.read().items()}
            assert_whole(Store.open(root), committed)
            assert_tidied(Store.open(root), committed)
            assert Store.open(root).locks() == []


@pytest.mark.usefixtures("without_fsync")
def test_the_lock_of_a_killed_process_blocks_no_other(
    tmp_path: Path, faults: Ledger, soak: bool, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    root = arena(tmp_path / "store", tmp_path / "base.safetensors")
    record = Record(tmp_path / "record")
    for kill in range(400 if soak else 25):
        child = begin(lambda n=kill: contenders.anything(root, record, n))
        assert not ended(child, chance.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
        store = Store(LocalBackend(root, lock_timeout=0.0))
        with faults.inject(f"kill of a process that {holds(store)}"):
            number = 1_000_000 + kill
            ckpt = store.save(content(number), parent=base_of(store), metadata={"number": number})
            store.forget(ckpt)
            store.plan_gc().execute()
            assert store.locks() == []
            assert_whole(store, record.read())


def holds(store: Store) -> str:
    """Return the locks of dead processes in words."""
    modes = {lock.shared for lock in store.locks() if lock.owner == "dead"}
    if not modes:
        return "has no lock"
    return "shares the lock" if modes == {True} else "has the lock alone"


class Sleepy(LocalBackend):
    """Stops its process right before a manifest is finalized; it seems to run in a container."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._locks = Locks(root, identify=lambda: replace(Process.this(), namespace="123abc"))

    @contextlib.contextmanager
    def writer(self):
        with super().writer() as inner:
            yield SleepyWriter(inner)


class SleepyWriter:
    def __init__(self, inner: Writer) -> None:
        self._inner = inner
        self.write = inner.write

    @property
    def position(self) -> int:
        return self._inner.position

    def finalize(self, path: str) -> None:
        if path.startswith("manifests/"):
            os.kill(os.getpid(), signal.SIGSTOP)
        self._inner.finalize(path)


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("how", ["expires", "is removed by force", "stays"])
def test_a_process_that_lost_its_lock_while_suspended_changes_nothing(
    tmp_path: Path, faults: Ledger, how: str
) -> None:
    root = arena(tmp_path / "store", tmp_path / "base.safetensors")
    store = Store(LocalBackend(root, lock_timeout=0.0))
    kept = store.save(content(1), parent=base_of(store))

    def suspended() -> int:
        sleepy = Store(Sleepy(root))
        try:
            sleepy.save(content(2), parent=base_of(sleepy))
        except BusyError as error:
            return 7 if "was taken away from save" in str(error) else 8
        return 0

    with faults.inject(f"suspended process whose lock {how}"):
        child = begin(suspended)
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        with pytest.raises(BusyError, match=r"gc waited 0 s .* save by process"):
            store.plan_gc().execute()
        (lock,) = (root / "locks").iterdir()
        if how == "expires":
            silence(lock)
        elif how == "is removed by force":
            assert len(store.unlock(force=True)) == 1
        if how != "stays":
            assert store.plan_gc().execute().freed_bytes > 0
        os.kill(child, signal.SIGCONT)
        assert end_of(child, LONG) == (0 if how == "stays" else 7)
        if how == "stays":
            assert len(store.log()) == 2
        else:
            assert [ckpt.id for ckpt in store.log()] == [kept.id]
        assert_whole(store, {kept.id: content(1)})
        assert_tidied(store, {kept.id: content(1)})
