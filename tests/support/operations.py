"""Every operation of a store, to run, interrupt and repeat on a store with all features.

Each can be repeated, by the same object or another one, and asserts what it is to have done.

Example::

    prepared = prepare(folder)
    save(Store.open(copy_of(prepared)), prepared)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from msft_store import KeepBest, KeepLast, Store, Timeline
from tests.support.states import State, same_bits, train_step, write_base

RETENTION = KeepLast(1) | KeepBest("score", 1)


def tiny_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.02 * torch.randn(24, 32, generator=generator)).bfloat16()
        for name in ("a.weight", "b.weight")
    }


@dataclass(frozen=True)
class Prepared:
    """A store on disk with all features, and the checkpoints that it must never lose."""

    root: Path
    states: Mapping[str, State]
    """The states of the checkpoints that no operation under test deletes, by id."""
    droppable: Mapping[str, State]
    ids: Mapping[str, str]


def prepare(folder: Path) -> Prepared:
    """Make chains with an anchor, a timeline on its second branch, dead, shared and held chunks."""
    store = Store.create(folder / "store")
    start = tiny_state()
    base = store.add_base(write_base(folder / "base.safetensors", start))
    write_base(folder / "other.safetensors", tiny_state(5))
    first = train_step(start, 0.3, 1)
    # Keeping one tensor of `gone` alive makes its pack partly dead.
    gone = train_step(start, 0.3, 2)
    kept_state = {"a.weight": gone["a.weight"], "b.weight": first["b.weight"]}
    below = train_step(first, 0.05, 3)
    anchor = store.save(first, parent=base, step=1)
    lost = store.save(gone, parent=base, step=2)
    kept = store.save(kept_state, parent=base, step=3)
    child = store.save(below, parent=anchor, step=4)
    held = store.save(train_step(start, 0.3, 4), parent=base, step=5)
    on_held = store.save(train_step(store.load(held), 0.05, 5), parent=held, step=6)
    on_held_state = store.load(on_held)
    store.pin(kept, "kept")
    line = Timeline(store, base, retention=RETENTION, name="run")
    commits = []
    for step in range(3):
        state = train_step(start, 0.2, 10 + step)
        score = [0.5, 0.9, 0.1][step]
        commits.append((line.commit(state, step=step, metrics={"score": score}), state))
    line.rollback(commits[1][0])
    branch = train_step(commits[1][1], 0.1, 20)
    newest = line.commit(branch, step=9, metrics={"score": 0.2})
    root = commits[1][0]
    store.forget(lost)
    store.forget(held)
    (folder / "store/tmp/0-left").write_bytes(b"of a save that was killed")
    return Prepared(
        root=folder,
        states={
            anchor.id: first,
            kept.id: kept_state,
            root.id: commits[1][1],
            on_held.id: on_held_state,
        },
        droppable={child.id: below, newest.id: branch},
        ids={"anchor": anchor.id, "child": child.id, "root": root.id, "newest": newest.id},
    )


Operation = Callable[[Store, Prepared], None]


def save(store: Store, prepared: Prepared) -> None:
    state = train_step(prepared.states[prepared.ids["anchor"]], 0.05, 30)
    ckpt = store.save(state, parent=prepared.ids["anchor"], step=30)
    assert same_bits(store.load(ckpt), state)


def pin(store: Store, prepared: Prepared) -> None:
    store.pin(prepared.ids["anchor"], "kept")
    assert store.refs()["kept"] == prepared.ids["anchor"]


def forget(store: Store, prepared: Prepared) -> None:
    if prepared.ids["child"] in {ckpt.id for ckpt in store.log()}:
        store.forget(prepared.ids["child"])
    assert prepared.ids["child"] not in {ckpt.id for ckpt in store.log()}


def anchor(store: Store, prepared: Prepared) -> None:
    store.anchor(prepared.ids["child"])
    assert same_bits(store.load(prepared.ids["child"]), prepared.droppable[prepared.ids["child"]])


def rebase(store: Store, prepared: Prepared) -> None:
    onto = store.anchor(prepared.ids["root"])
    for ckpt in store.log():
        if ckpt.base == onto.base:
            store.rebase(ckpt, onto)
    store.plan_gc().execute()


def release(store: Store, prepared: Prepared) -> None:
    forget(store, prepared)
    store.release(store.log())


def gc(store: Store, prepared: Prepared) -> None:
    # A pack stays if there is no space to rewrite it; this is no error.
    left = store.plan_gc().execute().left_bytes
    assert left or store.plan_gc().freed_bytes == 0


def repack(store: Store, prepared: Prepared) -> None:
    store.plan_repack().execute()
    plan = store.plan_repack()
    assert not plan.delete
    assert not plan.merge


def gc_with_policy(store: Store, prepared: Prepared) -> None:
    for name, identity in zip("xyz", prepared.states, strict=False):
        store.pin(identity, name)
    store.pin(list(prepared.states)[-1], "last")
    store.plan_gc(KeepLast(1)).execute()
    assert prepared.ids["child"] not in {ckpt.id for ckpt in store.log()}


def add_base(store: Store, prepared: Prepared) -> None:
    base = store.add_base(prepared.root / "other.safetensors")
    assert store.save(tiny_state(5), parent=base).stored_bytes == 0


def commit(store: Store, prepared: Prepared) -> None:
    line = Timeline(store, None, retention=RETENTION, name="run")
    assert line.root is not None
    assert line.root.id == prepared.ids["root"]
    state = train_step(prepared.states[prepared.ids["root"]], 0.05, 40)
    ckpt = line.commit(state, step=40, metrics={"score": 0.3})
    assert set(line.kept()) == {ckpt.id, prepared.ids["root"]}
    assert same_bits(store.load(ckpt), state)
    assert {prepared.ids["root"], ckpt.id} == set(
        refs_of(store) & {c.id for c in store.log() if "timeline" in c.metadata}
    )


def rollback(store: Store, prepared: Prepared) -> None:
    line = Timeline(store, None, retention=RETENTION, name="run")
    root = prepared.ids["root"]
    assert same_bits(line.rollback(root), prepared.states[root])
    assert line.root is not None
    assert line.root.id == root
    assert set(line.kept()) == {root} | {c for c in line.kept() if c == prepared.ids["newest"]}


def rollback_to_newest(store: Store, prepared: Prepared) -> None:
    line = Timeline(store, None, retention=RETENTION, name="run")
    newest, best = prepared.ids["newest"], prepared.ids["root"]
    assert same_bits(line.rollback(newest), prepared.droppable[newest])
    assert set(line.kept()) == {newest, best}
    assert same_bits(store.load(best), prepared.states[best])


def export(store: Store, prepared: Prepared) -> None:
    folder = Path(store.path).parent / "exported"
    if not folder.exists():
        store.export(prepared.ids["anchor"], folder)
        assert list(folder.parent.glob(".exported*")) == []
    state = prepared.states[prepared.ids["anchor"]]
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert same_bits(safetensors.torch.load_file(folder / "model.safetensors"), state)


def refs_of(store: Store) -> set[str]:
    """Return the targets of the timeline's refs."""
    return {ident for name, ident in store.refs().items() if name.startswith("timelines/run/")}


OPERATIONS = [
    save,
    pin,
    forget,
    anchor,
    rebase,
    release,
    gc,
    repack,
    gc_with_policy,
    add_base,
    commit,
    rollback,
    rollback_to_newest,
    export,
]
