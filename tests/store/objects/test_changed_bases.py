"""A base whose files change or go while checkpoints are saved against it.

Whatever ``save`` returned can be loaded, as a save keeps a copy of what the base no longer holds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from msft_store import (
    Base,
    BaseError,
    Checkpoint,
    KeepBest,
    KeepLast,
    Parts,
    Store,
    Timeline,
)
from msft_store.integrations.remote import clone, push
from msft_store.tensors.boxes import whole_box
from tests.support.states import State, make_state, same_bits, train_step, write_base

CHANGED = "model.layers.1.up.weight"


def rewrite(base: Base, state: State) -> None:
    """Save other weights over a base."""
    write_base(Path(base.path), state)


def rewrite_with_old_time(base: Base, state: State) -> None:
    """Save other weights over a base, and set the time of the file back."""
    before = os.stat(base.path)
    rewrite(base, state)
    os.utime(base.path, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(base: Base, state: State) -> None:
    """Delete the file of a base."""
    Path(base.path).unlink()


def truncate(base: Base, state: State) -> None:
    """Cut the file of a base in half."""
    path = Path(base.path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WAYS = (rewrite, rewrite_with_old_time, remove, truncate)
Way = Callable[[Base, State], None]


def other(state: State) -> State:
    """Return the state with one tensor changed."""
    return {**state, CHANGED: state[CHANGED] + 1}


def save(store: Store, state: State, base: Base) -> Checkpoint:
    return store.save(state, parent=base)


def commit(store: Store, state: State, base: Base) -> Checkpoint:
    timeline = Timeline(store, base, retention=KeepBest("m", k=9, mode="max"))
    return timeline.commit(state, 1, {"m": 1.0})


def save_parts(store: Store, state: State, base: Base) -> Checkpoint:
    boxes = [whole_box(name, tensor) for name, tensor in state.items()]
    parts = [Store.open(store.path).encode([box], parent=base) for box in boxes]
    return store.save(Parts(parts), parent=base)


@pytest.mark.parametrize("how", [save, commit, save_parts])
@pytest.mark.parametrize("reopened", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_saved_after_the_base_changed_can_be_loaded(
    store: Store,
    base: Base,
    state: State,
    *,
    way: Way,
    reopened: bool,
    how: Callable[[Store, State, Base], Checkpoint],
) -> None:
    assert store.save(state, parent=base).stored_bytes == 0
    way(base, other(state))
    if reopened:
        store = Store.open(store.path)
    for kept in (state, other(state), train_step(state, 0.05, 1)):
        ckpt = how(store, kept, base)
        assert same_bits(Store.open(store.path).load(ckpt), kept)
        assert store.stats().stored_bytes > 0


@pytest.mark.parametrize("way", WAYS)
def test_one_save_of_the_same_weights_restores_older_checkpoints(
    store: Store, base: Base, state: State, way: Way
) -> None:
    moved = train_step(state, 0.05, 1)
    whole, delta = store.save(state, parent=base, step=1), store.save(moved, parent=base, step=1)
    way(base, other(state))
    for ckpt, kept in ((whole, state), (delta, moved)):
        with pytest.raises(BaseError):
            store.load(ckpt)
        assert ckpt.id in store.examine(read_data=False).damaged
        store.save(kept, parent=base, step=2)
        assert same_bits(store.load(ckpt), kept)
    report = store.examine()
    assert len(report.sound) == 4
    assert {finding.kind for finding in report.findings} == {"base"}
    assert store.plan_repair().lost == ()


@pytest.mark.parametrize("truncated", [True, False])
def test_a_changed_base_and_a_damaged_copy_are_both_named(
    store: Store, base: Base, state: State, *, truncated: bool
) -> None:
    rewrite(base, other(state))
    ckpt = store.save(state, parent=base)
    (pack,) = Path(store.path).rglob("*.pack")
    data = pack.read_bytes()
    pack.chmod(0o644)
    pack.write_bytes(data[: len(data) // 2] if truncated else data[:99] + b"damage" + data[105:])
    with pytest.raises(BaseError) as caught:
        Store.open(store.path).load(ckpt)
    assert base.path in str(caught.value)
    assert str(pack) in str(caught.value)


def test_gc_keeps_the_copies_and_they_cost_nothing_once_the_checkpoints_go(
    store: Store, base: Base, state: State
) -> None:
    remove(base, state)
    first, second = (store.save(state, parent=base, step=step) for step in (1, 2))
    held = store.stats().stored_bytes
    assert first.stored_bytes == held > 0
    store.plan_gc(KeepLast(1)).execute()
    assert store.stats().stored_bytes == held
    assert same_bits(Store.open(store.path).load(second), state)
    store.forget(second)
    store.plan_gc().execute()
    assert store.stats().stored_bytes == 0


def test_later_changes_are_differences_from_the_copies(
    store: Store, base: Base, state: State
) -> None:
    remove(base, state)
    copy = store.save(state, parent=base)
    step = store.save(train_step(state, 0.01, 1), parent=copy)
    assert step.stored_bytes < copy.stored_bytes / 3
    store.forget(copy)
    store.plan_gc().execute()
    assert same_bits(Store.open(store.path).load(step), train_step(state, 0.01, 1))


def test_a_timeline_goes_on_after_its_base_changed(store: Store, base: Base, state: State) -> None:
    timeline = Timeline(store, base, retention=KeepBest("m", mode="max", k=2))
    weights = state
    for step in range(8):
        if step == 3:
            rewrite(base, train_step(state, 0.5, 9))
        weights = train_step(weights, 0.02, step)
        ckpt = timeline.commit(weights, step, {"m": float(step)})
        assert same_bits(Store.open(store.path).load(ckpt), weights)
    timeline.rollback(ckpt)
    weights = train_step(weights, 0.02, 99)
    ckpt = timeline.commit(weights, 8, {"m": 9.0})
    assert same_bits(Store.open(store.path).load(ckpt), weights)


def test_the_warning_comes_once_and_names_the_file(
    store: Store, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(5)
    mine = store.add_base(write_base(Path(base.path).with_name("mine.safetensors"), state))
    rewrite(mine, other(state))
    with caplog.at_level(logging.WARNING, "msft_store"):
        for step in range(2):
            store.save(state, parent=mine, step=step)
    (warning,) = caplog.messages
    assert mine.path in warning
    assert "changed" in warning


def test_a_base_that_is_put_back_is_used_again(store: Store, base: Base, state: State) -> None:
    content = Path(base.path).read_bytes()
    remove(base, state)
    Path(base.path).write_bytes(content)
    assert store.save(state, parent=base).stored_bytes == 0


def test_push_sends_the_copies_and_names_the_base_that_must_stay(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    ckpt = store.save(state, parent=base)
    sent = push(store, f"file://{tmp_path}/remote")
    assert sent.bases_left == (base.path,)
    assert base.path in str(sent)
    rewrite(base, other(state))
    assert store.save(state, parent=base).id == ckpt.id
    push(store, f"file://{tmp_path}/remote")
    clone(f"file://{tmp_path}/remote", tmp_path / "clone")
    assert same_bits(Store.open(tmp_path / "clone").load(ckpt.id), state)


def test_a_check_without_the_data_sees_a_base_that_changed(
    store: Store, base: Base, ckpt: Checkpoint, state: State
) -> None:
    assert store.check(read_data=False) == []
    os.utime(base.path)
    assert Store.open(store.path).check(read_data=False) == []
    rewrite_with_old_time(base, other(state))
    assert {f.base for f in store.check(read_data=False) if f.kind == "base"} == {base.id}


def test_weights_saved_over_their_base_are_kept(store: Store, base: Base, state: State) -> None:
    weights = train_step(state, 0.1, 3)
    safetensors.torch.save_file({n: t.clone() for n, t in weights.items()}, base.path)
    ckpt = store.save(weights, parent=base)
    assert same_bits(Store.open(store.path).load(ckpt), weights)
