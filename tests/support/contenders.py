"""The actions of processes that share a store: save, commit, collect, read.

Each process records the checkpoints that the store confirmed to it, and checks what it reads. The
only errors that it accepts are the documented conflicts: another process forgot or pinned a
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msft_store import (
    Base,
    KeepBest,
    KeepLast,
    PinnedError,
    Store,
    Timeline,
    UnknownCheckpointError,
)
from tests.support.operations import tiny_state
from tests.support.states import State, same_bits, train_step, write_base


def content(number: int) -> State:
    """Return the tensors of a number."""
    return train_step(tiny_state(), 0.3, number)


def arena(root: Path, base: Path) -> Path:
    """Create a store on a base file, which is written if it is not there; return its path."""
    if not base.exists():
        write_base(base, tiny_state())
    store = Store.create(root)
    store.add_base(base)
    return root


@dataclass(frozen=True)
class Record:
    """The checkpoints that a process knows to exist, in a file that survives the process."""

    path: Path

    def add(self, checkpoint: str, number: int) -> None:
        self._write(f"+ {checkpoint} {number}")

    def drop(self, checkpoint: str) -> None:
        """Record an action before it is done."""
        self._write(f"- {checkpoint} 0")

    def read(self) -> dict[str, State]:
        """Return the tensors of the checkpoints that must exist, by id."""
        numbers = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            sign, checkpoint, number = line.split()
            numbers[checkpoint] = int(number)
            if sign == "-":
                del numbers[checkpoint]
        return {checkpoint: content(number) for checkpoint, number in numbers.items()}

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")


def base_of(store: Store) -> Base:
    """Return the one base of a store."""
    (base,) = store.bases()
    return base


def save(root: Path, record: Record, me: int, rounds: int) -> int:
    """Save shared contents and own ones; pin, forget and extend the own ones."""
    store = Store.open(root)
    own = []
    for step in range(rounds):
        same = store.save(content(step), parent=base_of(store), metadata={"number": step})
        record.add(same.id, step)
        number = 1000 * me + step
        parent = own[-1][0] if step % 4 else base_of(store)
        ckpt = store.save(content(number), parent=parent, metadata={"number": number})
        record.add(ckpt.id, number)
        own.append((ckpt, number))
        assert same_bits(store.load(ckpt), content(number))
        store.pin(ckpt, f"newest/{me}")
        assert store.get(f"newest/{me}").id == ckpt.id
        if step % 3 == 2:
            gone, _ = own.pop(0)
            if gone.id != ckpt.id:
                record.drop(gone.id)
                store.forget(gone)
    return 0


def commit(root: Path, record: Record, me: int, rounds: int) -> int:
    """Run a timeline with commits in the foreground and background, and roll-backs."""
    store = Store.open(root)
    kept: dict[str, int] = {}
    line = Timeline(
        store, base_of(store), retention=KeepLast(2) | KeepBest("score"), name=f"line{me}"
    )
    for step in range(rounds):
        # Every other content is one that others commit too.
        number = step if step % 2 else 1000 * me + step
        facts = content(number), step, {"score": (step * 7) % 5}, {"number": number}
        ckpt = line.commit_async(*facts).result() if step % 3 else line.commit(*facts)
        kept[ckpt.id] = number
        if step % 5 == 4:
            back = sorted(line.kept())[step % len(line.kept())]
            assert same_bits(line.rollback(back), content(kept[back]))
        for identity in line.kept():
            assert same_bits(store.load(identity), content(kept[identity]))
    for identity in line.kept():
        record.add(identity, kept[identity])
    return 0


def until(stop: Path) -> Iterator[int]:
    """Count, at least to one, until a file exists."""
    count = 0
    while count == 0 or not stop.exists():
        yield count
        count += 1


def collect(root: Path, stop: Path) -> int:
    """Run gc again and again."""
    store = Store.open(root)
    for _ in until(stop):
        plan = store.plan_gc()
        assert plan.dropped == ()
        plan.execute()
    return 0


def read(root: Path, stop: Path, seed: int) -> int:
    """Load all checkpoints, completely and in part, and check the store."""
    chance = np.random.default_rng(seed)
    store = Store.open(root)
    for count in until(stop):
        if count % 7 == 0:
            store = Store.open(root)
        log = store.log()
        if log:
            ckpt = log[chance.integers(len(log))]
            with contextlib.suppress(UnknownCheckpointError):
                assert same_bits(store.load(ckpt), content(ckpt.metadata["number"]))
                store.tensors(ckpt)
                store.sources(ckpt)
                if count % 9 == 0:
                    store.export(ckpt, root.parent / f"{os.getpid()}-{count}")
        if count % 5 == 0:
            findings = store.check(read_data=count % 2 == 0)
            assert findings == [], findings
            store.stats()
            store.held_bytes()
            store.notes()
            str(store.plan_gc())
    return 0


def anything(root: Path, record: Record, me: int) -> int:
    """Save, pin, forget and collect until killed."""
    chance = np.random.default_rng(me)
    store = Store.open(root)
    for step in range(1_000_000):
        number = 1000 * me + step
        ckpt = store.save(content(number), parent=base_of(store), metadata={"number": number})
        record.add(ckpt.id, number)
        store.pin(ckpt, f"latest/{os.getpid() % 3}")
        gone = next(iter(record.read()))
        with contextlib.suppress(PinnedError):
            if chance.random() < 0.7:
                record.drop(gone)
                store.forget(gone)
        store.plan_gc().execute()
    return 0
