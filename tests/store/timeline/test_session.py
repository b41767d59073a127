"""The work of a commit and of a roll-back does not grow with the checkpoints that are kept.

Calls of the backend are counted, which is exact where timings are noisy.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from msft_store import BusyError, Checkpoint, KeepLast, Store, Timeline
from msft_store.objects.catalog import Catalog
from msft_store.storage.backend import LocalBackend, Writer

FEW, MANY = 5, 80
OPERATIONS = ("exists", "read", "size", "list", "scan", "delete", "move", "sync")


class CountingBackend(LocalBackend):
    """A folder that counts the calls of its operations by name."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in OPERATIONS:
            self.calls[name] += 1
        return super().__getattribute__(name)

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        self.calls["writer"] += 1
        with super().writer() as writer:
            yield writer

    @contextlib.contextmanager
    def lock(self, *, shared: bool, purpose: str) -> Iterator[None]:
        self.calls["lock"] += 1
        with super().lock(shared=shared, purpose=purpose):
            yield

    @property
    def operations(self) -> int:
        return sum(count for name, count in self.calls.items() if name != "lock")


class Run:
    """A timeline that keeps ``kept`` checkpoints, each a change of ``changed`` tensors."""

    def __init__(self, path: Path, kept: int, *, changed: int) -> None:
        Store.create(path)
        self.backend = CountingBackend(path)
        self.store = Store(self.backend)
        generator = torch.Generator().manual_seed(0)
        self.state = {f"w{i}": torch.randn(32, 32, generator=generator) for i in range(4)}
        self.changed = changed
        self.line = Timeline(self.store, None, retention=KeepLast(kept))
        self.kept = [self.commit(step) for step in range(kept + 2)][2:]

    def commit(self, step: int) -> Checkpoint:
        for name in list(self.state)[: self.changed]:
            self.state[name].view(-1)[step] += 1.0
        return self.line.commit(self.state, step=step, metrics={"loss": 1.0 / (step + 1)})

    def count(self) -> CountingBackend:
        self.backend.calls.clear()
        return self.backend


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    count: Counter[str] = Counter()
    refresh = Catalog.refresh

    def counted(self: Catalog) -> None:
        count["refresh"] += 1
        refresh(self)

    monkeypatch.setattr(Catalog, "refresh", counted)
    return count


@pytest.mark.parametrize("changed", [1, 4])
def test_a_commit_makes_as_many_calls_with_many_kept_as_with_few(
    tmp_path: Path, changed: int
) -> None:
    calls = {}
    for kept in (FEW, MANY):
        run = Run(tmp_path / str(kept), kept, changed=changed)
        counted = run.count()
        run.commit(900)
        assert len(run.line.checkpoints()) == kept
        calls[kept] = counted.operations
    assert calls[MANY] <= 1.2 * calls[FEW], calls


@pytest.mark.parametrize("changed", [1, 4])
@pytest.mark.parametrize("back_to", [0, 40, 79])
def test_a_roll_back_with_many_kept_takes_few_locks_refreshes_and_calls(
    tmp_path: Path, refreshes: Counter[str], changed: int, back_to: int
) -> None:
    run = Run(tmp_path / "store", MANY, changed=changed)
    counted, target = run.count(), run.kept[back_to]
    refreshes.clear()
    restored = run.line.rollback(target)
    assert counted.calls["lock"] <= 3
    assert refreshes["refresh"] <= 3
    assert counted.operations <= 600, counted.calls
    assert len(run.line.checkpoints()) == MANY
    assert run.line.root is not None
    assert run.line.root.id == target.id
    assert all(torch.equal(restored[name], run.store.load(target)[name]) for name in restored)
    assert run.store.check() == []


def test_another_process_saves_and_pins_and_the_next_session_sees_it(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    other = Store.open(tmp_path / "store")
    first = store.save({"w": torch.ones(3)})
    with store.session("test"):
        assert store.refs() == {}
        second = other.save({"w": torch.zeros(3)})
        other.pin(second, "best")
        assert store.log() == [first]
        assert store.refs() == {}
    assert store.log() == [first, second]
    assert store.refs() == {"best": second.id}


def test_a_ref_that_moves_back_and_forth_is_read_each_time(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    other = Store.open(tmp_path / "store")
    ids = [store.save({"w": torch.full((3,), float(i))}).id for i in range(3)]
    for number in range(30):
        other.pin(ids[number % 3], "best")
        assert store.refs() == {"best": ids[number % 3]}


def test_a_session_within_a_session_shares_it(tmp_path: Path) -> None:
    backend = CountingBackend(Path(Store.create(tmp_path / "store").path))
    store = Store(backend)
    backend.calls.clear()
    with store.session("outer", exclusive=True), store.session("inner"):
        saved = store.save({"w": torch.ones(3)})
        store.pin(saved, "best")
        store.unpin("best")
        assert store.evict([saved.id]).bytes > 0
        assert store.log() == []
    assert backend.calls["lock"] == 1


def test_a_shared_session_cannot_become_exclusive(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    with store.session("outer"), pytest.raises(BusyError, match="outer"):
        store.evict([])
    assert store.evict([]).freed_bytes == 0
