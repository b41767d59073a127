"""Chains of references: positions keep them short, and evicted links are released."""

from __future__ import annotations

from pathlib import Path

import pytest

from msft_store import Base, KeepLast, Store, Timeline
from msft_store.objects.chain import REACH, allowed_depth, newest_allowed
from msft_store.pipeline.encode import Encoded, Encoder, Work
from tests.support.states import State, same_bits, train_step


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The decoded bytes of each chunk that is encoded."""
    sizes: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, work: Work) -> Encoded:
        found = encode(self, work)
        sizes.append(found.size if found.record is not None else 0)
        return found

    monkeypatch.setattr(Encoder, "encode", counted)
    return sizes


def test_a_history_of_a_thousand_stays_shallow_and_near() -> None:
    depths: list[int] = []
    distances = []
    for position in range(1000):
        place = newest_allowed(allowed_depth(position, position), depths[::-1][:REACH])
        distances.append(position + 1 if place is None else place + 1)
        depths.append(1 if place is None else depths[-1 - place] + 1)
        assert depths[-1] == allowed_depth(position, position)
    assert max(depths) == 5
    assert sorted(depths)[500] == 3
    assert sorted(distances)[500] == 1
    assert sum(distance > 12 for distance in distances) < 100


def test_few_checkpoints_of_a_long_history_may_form_a_chain() -> None:
    assert [allowed_depth(position, 4) for position in range(20, 30)] == [5] * 10
    assert allowed_depth(0, 0) == 1


def test_commits_are_smaller_than_against_the_root(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(100))
    against_root = Store.create(Path(store.path).with_name("root"))
    root = against_root.add_base(base.path)
    near = far = 0
    for step in range(25):
        state = train_step(state, 0.02, step)
        near += line.commit(state, step=step).stored_bytes
        far += against_root.save(state, parent=root, step=step).stored_bytes
    assert near < 0.6 * far
    assert max(map(store.depth, line.checkpoints())) == 5


def test_evicted_links_are_released_for_less_than_a_save_each(
    store: Store, base: Base, state: State, encoded: list[int]
) -> None:
    line = Timeline(store, base, retention=KeepLast(5))
    states = {}
    for step in range(40):
        state = train_step(state, 0.02, step)
        states[line.commit(state, step=step).id] = state
    whole = sum(tensor.nbytes for tensor in state.values())
    assert sum(encoded) <= 2 * 40 * whole
    assert store.held_bytes() <= sum(c.stored_bytes for c in line.checkpoints())
    for ckpt in line.checkpoints():
        assert same_bits(store.load(ckpt), states[ckpt.id])
    assert store.check() == []


def test_a_release_frees_what_only_others_needed(store: Store, base: Base, state: State) -> None:
    states = [train_step(state, 0.02, 0)]
    for step in (1, 2):
        states.append(train_step(states[-1], 0.02, step))
    first = store.save(states[0], parent=base)
    second = store.save(states[1], parent=base, references=[first])
    third = store.save(states[2], parent=base, references=[second])
    assert [store.depth(ckpt) for ckpt in (first, second, third)] == [1, 2, 3]
    store.forget(second)
    before = store.stats().stored_bytes
    done = store.release([first, third])
    assert done.held_bytes == store.held_bytes() == 0
    assert done.freed_bytes > 0
    assert store.stats().stored_bytes < before
    assert store.depth(third) == 2
    assert same_bits(Store.open(store.path).load(third.id), states[2])
    assert store.check() == []


def test_a_release_that_would_free_nothing_encodes_nothing(
    store: Store, base: Base, state: State, encoded: list[int]
) -> None:
    first = store.save(train_step(state, 0.3, 0), parent=base)
    others = [
        store.save(
            train_step(store.load(first), 0.02, step), parent=base, step=step, references=[first]
        )
        for step in range(1, 7)
    ]
    store.forget(first)
    encoded.clear()
    assert store.release(others[:1]).held_bytes > 0
    assert encoded == []
    assert all(store.depth(ckpt) == 2 for ckpt in others)
