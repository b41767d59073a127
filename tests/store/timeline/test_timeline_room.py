"""A timeline on a full disk: its evictions, its deferred work, and its messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from msft_store import Base, DiskBudget, KeepBest, KeepLast, OutOfSpaceError, Store, Timeline
from tests.support.quota import QuotaBackend, bytes_on_disk
from tests.support.states import State, same_bits, train_step

KEPT = KeepBest("m") | KeepLast(2)


@pytest.fixture
def disk(store: Store, base: Base) -> QuotaBackend:
    return QuotaBackend(Path(store.path))


def test_a_roll_back_on_a_full_disk_defers_work_to_the_next_commit(
    disk: QuotaBackend, base: Base, state: State
) -> None:
    line = Timeline(Store(disk), base, retention=KEPT)
    line.rollback(line.commit(train_step(state, 0.3, 1), metrics={"m": 1}))
    root = train_step(line.rollback(line.root), 0.2, 2)
    target = line.commit(root, metrics={"m": 2})
    disk.quota = bytes_on_disk(disk.root) + 3000
    assert same_bits(line.rollback(target), root)
    done = line.last_commit
    assert done is not None
    assert "no space left" in str(done.postponed)
    assert done.checkpoint.id == target.id
    assert Timeline(Store(disk), base, retention=KEPT).root == line.root
    disk.quota = 1 << 60
    line.commit(train_step(root, 0.01, 3), metrics={"m": 0})
    done = line.last_commit
    assert done is not None
    assert done.postponed is None
    assert Store(disk).held_bytes() == 0
    assert Store(disk).check() == []


def test_a_commit_on_a_full_disk_evicts_only_checkpoints_that_no_rule_keeps(
    disk: QuotaBackend, base: Base, state: State
) -> None:
    line = Timeline(Store(disk), base, retention=KeepLast(9))
    ids = [line.commit(train_step(state, 0.3, n), metrics={"m": -n}).id for n in range(4)]
    disk.quota = bytes_on_disk(disk.root)
    line.retention = KEPT
    last = line.commit(train_step(state, 0.3, 9), metrics={"m": -9})
    done = line.last_commit
    assert done is not None
    assert set(done.dropped) == {ids[1], ids[2]}
    assert set(done.kept) == {ids[0], ids[3], last.id}
    disk.quota = bytes_on_disk(disk.root)
    with pytest.raises(OutOfSpaceError, match=r"would have been best m \(5\), one of the last 2"):
        line.commit(train_step(state, 0.3, 10), metrics={"m": 5})
    assert {c.id for c in Store(disk).log()} == set(done.kept)


def test_a_budget_gives_up_the_least_valuable_and_never_the_newest(
    disk: QuotaBackend, base: Base, state: State
) -> None:
    line = Timeline(Store(disk), base, retention=KeepLast(9))
    ids = [line.commit(train_step(state, 0.3, n), metrics={"m": 0}).id for n in range(4)]
    line.retention = KeepLast(9) | DiskBudget(bytes_on_disk(disk.root) + (16 << 10))
    last = line.commit(train_step(state, 0.3, 9), metrics={"m": 0})
    done = line.last_commit
    assert done is not None
    assert done.dropped[:1] == (ids[0],)
    assert {ids[3], last.id} <= set(done.kept)
