"""Repack makes few dense packs from many and loses nothing that a checkpoint needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from msft_store import Base, PinnedError, Store
from msft_store.maintenance import repack as module
from tests.support.states import State, same_bits, train_step


def make_history(store: Store, base: Base, state: State) -> dict[str, State]:
    """Save a few checkpoints and forget some; return what is left, by id."""
    states = [train_step(state, 0.05, seed) for seed in range(5)]
    saved = [store.save(each, parent=base, step=n) for n, each in enumerate(states)]
    mixed = {**states[0], **{n: t for n, t in states[4].items() if ".1." in n}}
    saved.append(store.save(mixed, parent=saved[4]))
    store.forget(saved[0])
    store.forget(saved[4])
    return {saved[n].id: state for n, state in ((1, states[1]), (2, states[2]), (5, mixed))}


def test_many_packs_become_one_and_nothing_dead_is_left(
    store: Store, base: Base, state: State
) -> None:
    left = make_history(store, base, state)
    before = {checkpoint.id: checkpoint for checkpoint in store.log()}
    plan = store.plan_repack()

    assert "would make 1 pack of " in str(plan)
    result = plan.execute()

    assert result.freed_bytes > 0
    store = Store.open(store.path)
    assert len(list(Path(store.path).glob("packs/*.pack"))) == 1
    assert store.check() == []
    assert {checkpoint.id for checkpoint in store.log()} == before.keys()
    for identity, expected in left.items():
        assert same_bits(store.load(identity), expected)
    again = store.plan_repack()
    assert (again.delete, again.merge, again.freed_bytes) == ((), (), 0)
    assert store.plan_gc().freed_bytes == 0


def test_large_packs_stay_alone(
    store: Store, base: Base, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALL", 1)
    make_history(store, base, state)

    plan = store.plan_repack()

    assert plan.merge
    assert all(len(group) == 1 and group[0].dead_bytes for group in plan.merge)
    plan.execute()
    assert store.check() == []


def test_a_group_has_a_limit(
    store: Store, base: Base, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 8_000)
    left = make_history(store, base, state)

    store.plan_repack().execute()

    assert store.check() == []
    for identity, expected in left.items():
        assert same_bits(Store.open(store.path).load(identity), expected)


def test_a_pinned_checkpoint_is_not_forgotten(store: Store, state: State) -> None:
    saved = store.save(state)
    store.pin(saved, "best")
    store.plan_repack().execute()

    with pytest.raises(PinnedError):
        store.forget(saved)
