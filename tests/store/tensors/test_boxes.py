"""Checkpoints of parts: what several processes encode, one of them saves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store import (
    Base,
    Box,
    InvalidInputError,
    KeepLast,
    MismatchError,
    Part,
    Parts,
    Store,
    Timeline,
)
from tests.support.states import State, make_state, same_bits, train_step


def cut(state: State, count: int, *, dim: int = 0) -> list[list[Box]]:
    """Return what each of ``count`` processes would hold: tensors cut along one dimension."""
    ranks: list[list[Box]] = [[] for _ in range(count)]
    for name, tensor in state.items():
        along = min(dim, tensor.dim() - 1)
        if along < 0:
            ranks[0].append(Box(name=name, shape=(), offset=(), tensor=tensor))
            continue
        at = 0
        for rank, part in enumerate(torch.tensor_split(tensor, count, dim=along)):
            offset = tuple(at if d == along else 0 for d in range(tensor.dim()))
            ranks[rank].append(
                Box(name=name, shape=tuple(tensor.shape), offset=offset, tensor=part)
            )
            at += part.shape[along]
    return ranks


def encoded(store: Store, ranks: list[list[Box]], parent: object = None) -> Parts:
    # Each process opens the store for itself.
    return Parts(Store.open(store.path).encode(boxes, parent=parent) for boxes in ranks)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_make_a_checkpoint_of_the_whole(
    store: Store, base: Base, state: State, count: int, dim: int
) -> None:
    trained = train_step(state, 0.05, 1)

    with store.awaiting_parts():
        saved = store.save(encoded(store, cut(trained, count, dim=dim), base), parent=base, step=3)

    assert same_bits(Store.open(store.path).load(saved.id), trained)
    assert saved.unreferenced_bytes == 0
    assert saved.stored_bytes < saved.logical_bytes / 2
    assert store.check() == []


def test_a_part_is_no_checkpoint(store: Store, base: Base, state: State) -> None:
    store.encode(cut(train_step(state, 0.05, 1), 2)[0], parent=base)

    assert store.log() == []
    store.plan_gc().execute()
    assert store.stats().stored_bytes == 0


def test_an_incomplete_set_of_parts_is_refused(store: Store, state: State) -> None:
    parts = encoded(store, cut(state, 2))

    with pytest.raises(InvalidInputError, match="do not cover"):
        store.save(Parts(list(parts)[:1]))
    assert store.log() == []


def test_another_base_is_refused(store: Store, base: Base, state: State) -> None:
    with pytest.raises(InvalidInputError, match="another base"):
        store.save(encoded(store, cut(state, 2)), parent=base)


def test_a_chunk_that_gc_took_in_between_is_noticed(store: Store, state: State) -> None:
    parts = encoded(store, cut(state, 2))
    store.plan_gc().execute()

    with pytest.raises(InvalidInputError, match=r"Store\.awaiting_parts"):
        store.save(parts)


def test_a_box_outside_of_its_tensor_is_refused(store: Store) -> None:
    box = Box(name="w", shape=(4,), offset=(3,), tensor=torch.ones(2))

    with pytest.raises(InvalidInputError, match="'w'"):
        store.encode([box])


def test_a_timeline_commits_parts(store: Store, base: Base, state: State) -> None:
    timeline = Timeline(store, base, retention=KeepLast(2))
    states = [train_step(state, 0.05, seed) for seed in range(4)]

    commits = []
    for step, each in enumerate(states):
        with store.awaiting_parts():
            parts = encoded(store, cut(each, 2), timeline.root)
        commits.append(timeline.commit(parts, step))

    assert [c.step for c in timeline.checkpoints()] == [2, 3]
    assert same_bits(timeline.rollback(commits[2]), states[2])
    assert store.check() == []


def test_a_part_goes_to_another_process(store: Store, state: State) -> None:
    (part,) = encoded(store, cut(state, 1))

    assert isinstance(part, Part)
    assert part.tensors.keys() == state.keys()


@settings(max_examples=30, deadline=None)
@given(
    before=st.tuples(st.integers(1, 4), st.integers(0, 1)),
    after=st.tuples(st.integers(1, 4), st.integers(0, 1)),
    big=st.booleans(),
)
def test_any_cut_is_loaded_from_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    before: tuple[int, int],
    after: tuple[int, int],
    big: bool,
) -> None:
    store = Store.create(tmp_path_factory.mktemp("store") / "store")
    state = make_state(3, big=big)
    saved = store.save(encoded(store, cut(state, before[0], dim=before[1])))
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    for boxes in cut(blank, after[0], dim=after[1]):
        store.load_boxes(saved, boxes)

    assert same_bits(blank, state)


def test_a_box_of_another_shape_or_dtype_is_refused(store: Store, state: State) -> None:
    saved, name = store.save(state), "model.layers.0.up.weight"
    good = Box(name=name, shape=(128, 64), offset=(2, 3), tensor=torch.zeros(3, 5).bfloat16())
    for wrong in (
        Box(name=name, shape=(128, 65), offset=(0, 0), tensor=good.tensor),
        Box(name=name, shape=(128, 64), offset=(0, 0), tensor=torch.zeros(3, 5)),
        Box(name="other", shape=(3, 5), offset=(0, 0), tensor=good.tensor),
    ):
        with pytest.raises(MismatchError, match="Nothing was changed"):
            store.load_boxes(saved, [good, wrong])
    assert not good.tensor.any()

    store.load_boxes(saved, [good])

    assert torch.equal(good.tensor, state[name][2:5, 3:8])


@settings(max_examples=15, deadline=None)
@given(before=st.integers(1, 4), after=st.integers(1, 4), share=st.sampled_from([0.0, 0.02]))
def test_any_cut_follows_any_other(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int, share: float
) -> None:
    store = Store.create(tmp_path_factory.mktemp("store") / "store")
    state = make_state(3, big=True)
    first = store.save(encoded(store, cut(state, before)))
    trained, full = train_step(state, share, 5), store.stats().stored_bytes

    second = store.save(encoded(store, cut(trained, after), first), parent=first)

    assert same_bits(Store.open(store.path).load(second.id), trained)
    assert store.stats().stored_bytes - full < second.logical_bytes * (0.1 if share else 0.001)
    assert store.check() == []
    store.forget(first)
    store.plan_gc().execute()
    store.anchor(second)
    store.plan_gc().execute()
    assert same_bits(Store.open(store.path).load(second.id), trained)
    assert store.check() == []


def test_columns_of_a_large_tensor_come_out_of_its_rows(store: Store) -> None:
    # More than one band of rows, and no chunk of theirs ends where a row does.
    large = (torch.arange(71 * 1_000_003) % 251).to(torch.uint8).reshape(71, 1_000_003)
    saved = store.save({"w": large})
    box = Box(name="w", shape=(71, 1_000_003), offset=(1, 7), tensor=torch.zeros(69, 5).byte())

    store.load_boxes(saved, [box])

    assert torch.equal(box.tensor, large[1:70, 7:12])


def test_tied_boxes_are_encoded_once(store: Store, base: Base, state: State) -> None:
    name = "model.layers.0.up.weight"
    trained = train_step(state, 0.05, 1)
    tied = {"head": trained[name], **trained}

    (part,) = encoded(store, cut(tied, 1), base)

    assert part.unreferenced_bytes == 0
    assert same_bits(store.load(store.save(Parts([part]), parent=base)), tied)
