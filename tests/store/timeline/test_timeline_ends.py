"""The start and end of a timeline: invalid arguments, closing, and continuing after a kill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msft_store import (
    Base,
    Champions,
    Checkpoint,
    InvalidInputError,
    KeepBest,
    KeepLast,
    Policy,
    StorageError,
    Store,
    StoreError,
    Timeline,
    UnknownCheckpointError,
)
from msft_store.storage.backend import LocalBackend
from msft_store.testing import WRITE_OPERATIONS, FaultyBackend, SimulatedKill
from tests.support.states import State, same_bits, train_step


def checkpoint_ids(store: Store) -> set[str]:
    return {ckpt.id for ckpt in store.log()}


def stopped_at(store: Store, n: int, work: Callable[[Store], object]) -> bool:
    """Do something until a kill at its n-th change of the disk; return whether there was one."""
    backend = FaultyBackend(
        LocalBackend(Path(store.path)), error=SimulatedKill, kinds=WRITE_OPERATIONS
    )
    other = Store(backend)
    backend.arm(n)
    with contextlib.suppress(SimulatedKill):
        work(other)
    return backend.failed


@pytest.mark.parametrize(
    "use",
    [
        lambda line, ckpt: line.commit({"a": torch.ones(3)}),
        lambda line, ckpt: line.commit_async({"a": torch.ones(3)}),
        lambda line, ckpt: line.rollback(ckpt),
        lambda line, ckpt: line.rewind(0),
    ],
    ids=["commit", "commit_async", "rollback", "rewind"],
)
def test_a_closed_timeline_is_used_no_more(
    store: Store, base: Base, state: State, use: Callable[[Timeline, Checkpoint], object]
) -> None:
    line = Timeline(store, base, retention=KeepLast(2))
    ckpt = line.commit(state, step=1)
    line.close()
    line.close()
    with pytest.raises(InvalidInputError, match="closed"):
        use(line, ckpt)
    assert line.last_commit is not None
    assert checkpoint_ids(store) == {ckpt.id}


@pytest.mark.parametrize("n", range(12))
def test_closing_loses_nothing_wherever_it_is_killed(
    store: Store, base: Base, state: State, n: int
) -> None:
    line = Timeline(store, base, retention=KeepLast(3))
    line.rollback(line.commit(train_step(state, 0.1, 0)))
    states = {}
    for step in range(2):
        states[step] = train_step(state, 0.1, 1 + step)
        line.commit(states[step], step=step)
    before = checkpoint_ids(store)

    def close(other: Store) -> None:
        Timeline(other, base, retention=KeepLast(3)).close()

    killed = stopped_at(store, n, close)
    again = Timeline(Store.open(store.path), base, retention=KeepLast(3))
    assert checkpoint_ids(store) == before
    assert killed or again.branch == 0
    if again.branch == 0:
        # The old timeline had begun to close, so its checkpoints do not belong to the new one.
        assert store.refs() == {}
        again.commit(state)
    assert before <= checkpoint_ids(store)


def test_numbers_beyond_the_next_commit_are_refused(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepBest("m"))
    for step in range(3):
        line.commit(train_step(state, 0.1, step), metrics={"m": -step})
    with pytest.raises(InvalidInputError, match=r"number 3; .* not 99"):
        line.rewind(99)
    line.rewind(3)
    # Evicted checkpoints leave no trace, so a resumed timeline needs a rewind to go on counting.
    again = Timeline(store, base, retention=KeepBest("m"))
    again.rewind(3)
    assert again.commit(state, metrics={"m": -9}).metadata["timeline"]["index"] == 3


@pytest.mark.parametrize("retention", [None, "last", KeepLast])
def test_only_a_policy_is_a_retention(store: Store, base: Base, retention: Policy) -> None:
    with pytest.raises(InvalidInputError, match="a retention policy"):
        Timeline(store, base, retention=retention)
    line = Timeline(store, base, retention=KeepLast(1))
    with pytest.raises(InvalidInputError, match="a retention policy"):
        line.retention = retention


def test_the_start_of_a_timeline_is_checked_at_once(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    elsewhere = Store.create(tmp_path / "elsewhere")
    ckpt = elsewhere.save(state)
    with pytest.raises(UnknownCheckpointError):
        Timeline(elsewhere, base, retention=KeepLast(1))
    with pytest.raises(UnknownCheckpointError):
        Timeline(store, ckpt, retention=KeepLast(1))
    with pytest.raises(InvalidInputError, match="starts from"):
        Timeline(store, 7, retention=KeepLast(1))
    assert store.refs() == {}


@pytest.mark.parametrize(
    "policy", [KeepBest("los", 2, mode="min"), Champions({"los": "min", "x": "max"})]
)
@pytest.mark.parametrize("background", [False, True])
def test_a_metric_that_no_checkpoint_has_evicts_nothing(
    store: Store, base: Base, state: State, policy: Policy, *, background: bool
) -> None:
    line = Timeline(store, base, retention=policy)
    commit = line.commit_async if background else line.commit
    with pytest.raises(InvalidInputError, match=r"'los'.*the nearest is 'loss'"):
        commit(state, metrics={"accuracy": 1.0, "loss": 2.0})
    assert checkpoint_ids(store) == set()
    line.retention = KeepBest("loss", 2, mode="min")
    ckpt = line.commit(state, metrics={"accuracy": 1.0, "loss": 2.0})
    assert checkpoint_ids(store) == {ckpt.id}


@pytest.mark.parametrize(
    ("policy", "measured", "stay"),
    [
        (KeepBest("los") | KeepLast(1), [{"loss": 1.0}], 1),
        (Champions({"a": "max", "b": "max"}), [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}], 2),
        (KeepBest("m"), [{"m": float("nan")}, {"m": 1.0}], 1),
        (KeepBest("m"), [{}], 0),
    ],
)
def test_metrics_may_come_one_at_a_time(
    *, store: Store, base: Base, state: State, policy: Policy, measured: list[dict], stay: int
) -> None:
    line = Timeline(store, base, retention=policy)
    for step, metrics in enumerate(measured):
        line.commit(train_step(state, 0.1, step), metrics=metrics)
    assert len(checkpoint_ids(store)) == len(line.kept()) == stay


def test_a_roll_back_that_was_killed_is_finished_by_the_next_timeline(
    store: Store, base: Base, state: State
) -> None:
    policy = KeepBest("m") | KeepLast(1)
    line = Timeline(store, base, retention=policy)
    line.rollback(line.commit(train_step(state, 0.3, 1), metrics={"m": 0.0}))
    root_state = store.load(line.root)
    best_state = train_step(root_state, 0.02, 2)
    best = line.commit(best_state, metrics={"m": 9.0})
    last = line.commit(train_step(root_state, 0.02, 3), metrics={"m": 1.0})
    # Two refs for the new root, three for what is given up, and nothing is encoded anew yet.
    n = next(
        n
        for n in range(100)
        if stopped_at(
            store, 1 + n, lambda other: Timeline(other, base, retention=policy).rollback(last.id)
        )
        and checkpoint_ids(store) == {best.id, last.id}
    )
    assert n > 0
    Timeline(store, base, retention=policy)
    store.plan_gc().execute()
    assert store.stats().held_bytes == 0
    assert same_bits(store.load(best), best_state)


@pytest.mark.parametrize("operation", ["anchor", "rebase"])
def test_the_stored_bytes_are_right_after_a_kill_before_the_manifest(
    store: Store, base: Base, state: State, operation: str
) -> None:
    root = store.save(train_step(state, 0.3, 1), parent=base)
    child = store.save(train_step(store.load(root), 0.02, 2), parent=root)
    other = store.save(train_step(store.load(root), 0.02, 3), parent=root)
    store.forget(root)
    if operation == "rebase":
        store.anchor(other)

    def encode(there: Store) -> Checkpoint:
        return there.anchor(child) if operation == "anchor" else there.rebase(child, other)

    for n in range(20):
        stopped_at(store, n, encode)
    found, again = encode(Store.open(store.path)), Store.open(store.path)
    expected = sum(source.stored_bytes for source in again.sources(found))
    assert found.stored_bytes == again.get(child.id).stored_bytes == expected


def test_a_start_that_is_kept_does_not_turn_back_the_branch(
    store: Store, base: Base, state: State
) -> None:
    """A timeline starts from a commit of a higher branch of an earlier one of its name."""
    with Timeline(store, base, retention=KeepLast(3)) as earlier:
        for seed in range(3):
            earlier.rollback(earlier.commit(train_step(state, 0.1, seed)))
        start = earlier.commit(state, metrics={"m": 0.0, "all": 9.0})
    policy = Champions({"m": "max"}) | KeepBest("all")
    line = Timeline(store, start, retention=policy)
    line.rollback(line.commit(train_step(state, 0.1, 5), metrics={"m": 1.0, "all": 1.0}))
    champion = line.commit(train_step(state, 0.1, 6), metrics={"m": 2.0, "all": 2.0})
    again = Timeline(Store.open(store.path), start, retention=policy)
    again.commit(train_step(state, 0.1, 7), metrics={"m": 1.5, "all": 1.5})
    assert champion.id in again.kept()
    again.retention = KeepLast(1)
    again.commit(train_step(state, 0.1, 8))
    assert start.id not in again.kept()
    assert start.id in checkpoint_ids(store)


def test_equal_commits_of_an_earlier_timeline_are_not_evicted(
    store: Store, base: Base, state: State
) -> None:
    with Timeline(store, base, retention=KeepLast(1)) as earlier:
        ckpt = earlier.commit(state, step=1)
    line = Timeline(store, base, retention=KeepLast(1))
    assert line.commit(state, step=1).id == ckpt.id
    last = line.commit(train_step(state, 0.1, 1), step=2)
    assert checkpoint_ids(store) == {ckpt.id, last.id}
    assert line.last_commit is not None
    assert line.last_commit.dropped == ()


def test_a_commit_whose_eviction_failed_can_be_followed_by_any_other(
    store: Store, base: Base, state: State
) -> None:
    backend = FaultyBackend(
        LocalBackend(Path(store.path)), error=StorageError, kinds=WRITE_OPERATIONS
    )
    line = Timeline(Store(backend), base, retention=KeepLast(2))
    for step in range(2):
        line.commit(train_step(state, 0.1, step), step=step)
    line.retention = KeepLast(1)
    for n in range(30):
        backend.arm(n)
        with contextlib.suppress(StoreError):
            line.commit(train_step(state, 0.1, 5), step=5)
        failed, backend.fail_at = backend.failed, None
        line.retention = KeepLast(5)
        done = line.commit(train_step(state, 0.1, 10 + n), step=10 + n)
        assert done.id in line.kept()
        assert set(line.kept()) == checkpoint_ids(store)
        line.retention = KeepLast(1)
        if not failed:
            break
    assert n > 3


def test_a_timeline_can_start_from_a_checkpoint_that_a_killed_timeline_left(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=KeepLast(1))
    line.commit(state, step=0)
    place = {"timeline": {"name": "main", "branch": 0, "index": 1}}
    stray = store.save(train_step(state, 0.1, 1), parent=base, metadata=place)
    again = Timeline(Store.open(store.path), stray, retention=KeepLast(1))
    assert again.root == store.get(stray.id)
    again.commit(state, step=2)
    assert stray.id in checkpoint_ids(store)
