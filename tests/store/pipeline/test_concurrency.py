"""Threads and processes that share a store, and locks."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from msft_store import Base, BusyError, Checkpoint, KeepLast, Store, Timeline
from msft_store.storage import backend
from msft_store.storage.backend import LocalBackend, write_atomic
from tests.support.states import State, same_bits, train_step


def test_stores_in_several_threads_save_and_collect_at_once(
    store: Store, base: Base, state: State
) -> None:
    def work(worker: int) -> list[tuple[str, State]]:
        mine = Store.open(store.path)
        line = Timeline(mine, base, retention=KeepLast(2), name=f"w{worker}")
        done = []
        for step in range(6):
            # Every other content is the same for all of them.
            moved = train_step(state, 0.05, step if step % 2 else 100 * worker + step)
            ckpt = line.commit(moved, step=step)
            assert same_bits(mine.load(ckpt), moved)
            done.append((ckpt.id, moved))
        return done[-2:]

    with ThreadPoolExecutor(3) as pool:
        results = [pair for done in pool.map(work, range(3)) for pair in done]
    again = Store.open(store.path)
    assert {ckpt.id for ckpt in again.log()} == {identity for identity, _ in results}
    for identity, expected in results:
        assert same_bits(again.load(identity), expected)
    assert again.check() == []


def test_one_store_is_used_by_several_threads(store: Store, base: Base, state: State) -> None:
    ckpts = [store.save(train_step(state, 0.05, i), parent=base) for i in range(4)]

    def work(worker: int) -> bool:
        if worker % 2:
            store.save(train_step(state, 0.05, 50 + worker), parent=ckpts[0])
            store.plan_gc().execute()
            store.stats()
        number = worker % len(ckpts)
        return same_bits(store.load(ckpts[number]), train_step(state, 0.05, number))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))
    assert store.check() == []


def test_a_reader_finds_chunks_that_a_gc_moved(store: Store, base: Base, state: State) -> None:
    first = store.save(train_step(state, 0.3, 1), parent=base)
    moved = train_step(store.load(first), 0.02, 2)
    second = store.save(moved, parent=first)
    stale = Store.open(store.path)
    store.anchor(second)
    store.forget(first)
    store.plan_gc().execute()
    assert same_bits(stale.load(second.id), moved)
    with pytest.raises(Exception, match=r"forgotten|no checkpoint"):
        stale.load(first.id)


def test_two_store_objects_see_the_changes_of_each_other(
    store: Store, base: Base, state: State
) -> None:
    other = Store.open(store.path)
    moved = train_step(state, 0.1, 1)
    ckpt = store.save(moved, parent=base)
    assert same_bits(other.load(ckpt.id), moved)
    other.forget(ckpt)
    other.plan_gc().execute()
    assert store.log() == []
    again = store.save(moved, parent=base)
    assert again.id == ckpt.id
    assert same_bits(other.load(again), moved)


@pytest.mark.parametrize("held_shared", [True, False])
def test_a_busy_error_names_the_holder_of_the_lock(
    store: Store, base: Base, state: State, held_shared: bool
) -> None:
    ckpt = store.save(state, parent=base)
    holder = LocalBackend(Path(store.path))
    hasty = Store(LocalBackend(Path(store.path), lock_timeout=0.0))

    def meet() -> None:
        # Reading needs no lock.
        assert same_bits(hasty.load(ckpt), state)
        assert hasty.check() == []
        if held_shared:
            hasty.save(train_step(state, 0.1, 1), parent=ckpt)
        else:
            with pytest.raises(BusyError, match=r"save waited 0 s.*long-gc by process \d+"):
                hasty.save(state, parent=ckpt)
        with pytest.raises(BusyError, match="forget waited"):
            hasty.forget(ckpt)
        with pytest.raises(BusyError, match="gc waited"):
            hasty.plan_gc().execute()

    with holder.lock(shared=held_shared, purpose="long-gc"), ThreadPoolExecutor(1) as pool:
        pool.submit(meet).result()
    hasty.forget(ckpt)


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a ref is, whose note grows with every commit of another process.
    local, opened = LocalBackend(tmp_path), backend._open_regular
    write_atomic(local, "refs/one.json", b"short")

    def replaced(path: str | Path, *, follow: bool) -> int:
        if str(path).endswith("one.json"):
            (tmp_path / "other").write_bytes(b"much longer")
            (tmp_path / "other").replace(tmp_path / "refs" / "one.json")
        return opened(path, follow=follow)

    monkeypatch.setattr(backend, "_open_regular", replaced)
    assert local.read("refs/one.json") == b"much longer"


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """The rows of a tensor of a checkpoint, read where they are asked for."""

    def __init__(self, store: Store, ckpt: Checkpoint, name: str) -> None:
        self.store, self.ckpt, self.name = store, ckpt, name

    def __len__(self) -> int:
        return self.store.tensors(self.ckpt)[self.name].shape[0]

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.store.load(self.ckpt, [self.name])[self.name][row]


def test_spawned_loaders_open_a_store_anew(store: Store, ckpt: Checkpoint, state: State) -> None:
    name = "model.layers.1.norm.weight"
    rows = Rows(store, ckpt, name)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(rows, range(4)), num_workers=1, multiprocessing_context="spawn"
    )
    expected = train_step(state, 0.05, 1)[name][:4]
    assert torch.equal(torch.cat(list(loader)), expected)
    with store.session("commit"):
        again, same = pickle.loads(pickle.dumps((store, ckpt)))  # noqa: S301
    assert (again.path, same) == (store.path, ckpt)
    again.save(state, step=3)
    assert store.get(again.log()[-1]).step == 3
    assert store.locks() == []
