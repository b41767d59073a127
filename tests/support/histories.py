"""The common part of random histories of a store: a reference model, faults, and processes.

Several stores are open on one directory. A fault that is due strikes at one of the operations to
come; after a kill the process begins anew. After each step the store lists what the model has; at
the end every tensor of every checkpoint is as it was saved.

Example::

    class Saving(Histories):
        @rule(at=PICKS)
        def save(self, at):
            opened, after = self._any(at), self.model.copy()
            after.add(point)
            self._do(opened, after, lambda: opened.store.save(point.state))
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from msft_store import (
    Champions,
    DiskBudget,
    KeepBest,
    KeepLast,
    PeakWindow,
    StorageError,
    Store,
    StoreError,
    Timeline,
)
from msft_store.storage.backend import FileStat, LocalBackend
from msft_store.testing import FaultyBackend, SimulatedKill
from tests.support.changes import in_float32, small_state
from tests.support.invariants import assert_tidied
from tests.support.ledger import Ledger
from tests.support.model import Model, between
from tests.support.naive import Parts
from tests.support.states import State, same_bits, write_base

T = TypeVar("T")
PICKS = st.integers(0, 1 << 16)
SEEDS = st.integers(0, 1 << 20)
SHARES = st.sampled_from((0.0, 0.02, 0.3, 1.0))
VALUES = st.sampled_from((0.0, 1.0, 2.0, 3.0, float("nan"), float("inf")))
METRICS = st.dictionaries(st.sampled_from(("m", "n")), VALUES)
PARTS: st.SearchStrategy[Parts] = st.sampled_from(
    (
        (KeepLast(1),),
        (KeepLast(3),),
        (KeepBest("m", 2),),
        (Champions({"m": "max", "n": "min"}), KeepBest("m")),
        (PeakWindow({"m": "max", "n": "max"}, 2), KeepBest("n", mode="min")),
        (KeepBest("n", 1, "min"), KeepLast(2), DiskBudget(1 << 30)),
        (DiskBudget(1 << 30),),
        (KeepBest("mm"),),
    )
)
MOST_OPEN = 3


@dataclass
class Tally:
    """Totals over all histories."""

    steps: int = 0
    kills: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Opened:
    """A store and the backend that it is on."""

    store: Store
    backend: FaultyBackend


class UnversionedBackend(LocalBackend):
    """A backend without versions of files.

    Versions depend on the clock. With them, the number of operations of a step would differ from
    one execution of a history to the next, and a fault would strike elsewhere.
    """

    def scan(self, folder: str) -> dict[str, FileStat]:
        return {path: FileStat(found.size) for path, found in super().scan(folder).items()}


class Histories(RuleBasedStateMachine):
    """A store and the model of its content."""

    ledger = Ledger()
    tally = Tally()

    @initialize(seed=SEEDS, faults=st.sampled_from((0.0, 0.1, 0.3)))
    def begin(self, seed: int, faults: float) -> None:
        self.folder = Path(tempfile.mkdtemp())
        Store.create(self.folder / "store")
        self.starts = [small_state(0), small_state(1), small_state(2)]
        self.bases: list[str] = []
        self.moves = self.steps = 0
        self.model = Model()
        self.chance, self.faults = np.random.default_rng(seed), faults
        self.fault: tuple[int, type[BaseException]] | None = None
        self.killed: list[Opened] = []
        self.clean = True
        self.lines: dict[str, tuple[Opened, Timeline]] = {}
        self.opened = [self._open()]
        self.add_base(0)

    def _open(self) -> Opened:
        backend = FaultyBackend(UnversionedBackend(self.folder / "store"))
        return Opened(Store(backend), backend)

    def _pick(self, number: int) -> str:
        ids = self.model.in_order(self.model.points)
        return ids[number % len(ids)]

    def _any(self, number: int) -> Opened:
        return self.opened[number % len(self.opened)]

    def _do(
        self,
        opened: Opened,
        after: Model,
        work: Callable[[], T],
        *,
        refused: type[StoreError] | None = None,
        safely: bool = False,
        **possible: Any,
    ) -> T | None:
        """Run an action with the fault that is due; return its result if it completed.

        ``self.clean`` then says whether no fault struck; one that did was got over.
        """
        self.tally.steps += 1
        self.steps += 1
        fault = None if safely else self._fault_due()
        self.fault = self.fault if safely else None
        backend, result = opened.backend, None
        backend.failed = False
        if fault is not None:
            backend.arm(*fault)
        try:
            result = work()
            assert refused is None or backend.failed, f"{refused} was to be raised"
        except SimulatedKill:
            self.tally.kills += 1
            with self.ledger.inject("kill in a random history"):
                self.killed.append(opened)
                self.opened, self.lines, self.model.lines = [self._open()], {}, {}
                self._settle(after, **possible)
            return None
        except StoreError as error:
            backend.disarm()
            if backend.failed:
                self.tally.errors += 1
                with self.ledger.inject("error in a random history"):
                    self._settle(after, **possible)
            elif refused is None or not isinstance(error, refused):
                raise
            else:
                self.model.assert_equals(opened.store)
            return None
        if fault is not None and not backend.failed:
            self.fault = (max(0, fault[0] - backend.count), fault[1])
        backend.disarm()
        self.model = after.named({ckpt.id: ckpt for ckpt in opened.store.log()})
        self.model.assert_equals(self._any(self.steps).store)
        self.clean = not backend.failed
        return result

    def _fault_due(self) -> tuple[int, type[BaseException]] | None:
        """Return the number of the operation that fails and its error, if a fault is due."""
        if self.fault is None and self.chance.random() < self.faults:
            # A full disk is not injected: the timeline would evict what its policy can spare.
            error = SimulatedKill if self.chance.random() < 0.5 else StorageError
            self.fault = int(self.chance.exponential(30)), error
        return self.fault

    def _settle(self, after: Model, **possible: Any) -> None:
        fresh = self._open().store
        self.model = between(self.model, after, fresh, **possible)
        for opened in self.opened:
            self.model.assert_equals(opened.store)
        assert fresh.check(read_data=False) == []

    @rule(at=PICKS)
    def open_another(self, at: int) -> None:
        if len(self.opened) == MOST_OPEN:
            del self.opened[at % MOST_OPEN]
        self.opened.append(self._open())

    @rule(which=st.integers(0, 2), at=PICKS)
    def add_base(self, which: int, at: int = 0) -> None:
        start = in_float32(self.starts[2]) if which == 2 else self.starts[which]
        path = self.folder / f"{which} {self.moves}.safetensors"
        if not path.exists():
            write_base(path, start)
        opened = self._any(at)
        base = self._do(opened, self.model, lambda: opened.store.add_base(path))
        if base is not None and base.id not in self.bases:
            self.bases.append(base.id)
            assert {known.id for known in opened.store.bases()} >= set(self.bases)

    @precondition(lambda self: self.bases)
    @rule(which=PICKS, at=PICKS)
    def relocate(self, which: int, at: int) -> None:
        opened, identity = self._any(at), self.bases[which % len(self.bases)]
        self.moves += 1
        old = Path(self._open().store.base(identity).path)
        new = self.folder / f"{old.name.split()[0]} {self.moves}.safetensors"
        shutil.copy(old, new)
        if self._do(opened, self.model, lambda: opened.store.relocate(identity, new)) is not None:
            # A process that read the record before reads it again.
            old.unlink()

    def _source(self, parent: str | None, number: int) -> State:
        if parent in self.model.points:
            return self.model.points[parent].state
        if parent is None and number % 2 and self.model.points:
            return self.model.points[self._pick(number)].state
        return self.starts[number % 3 if parent is None else self._which(parent)]

    def _which(self, base: str) -> int:
        return int(Path(self._open().store.base(base).path).name.split()[0])

    def _parent(self, number: int) -> str | None:
        """Return no parent, a base, or, mostly, a checkpoint."""
        choices = [None, *self.bases, *self.model.points, *self.model.points]
        return choices[number % len(choices)]

    def _base_of(self, parent: str | None) -> str | None:
        return self.model.points[parent].base if parent in self.model.points else parent

    def _meanwhile(self, state: State, begin: Callable[[State], T]) -> T:
        """Start a save of tensors that change at once."""
        once = {id(tensor): tensor.clone() for tensor in state.values()}
        passed = {name: once[id(tensor)] for name, tensor in state.items()}
        future = begin(passed)
        for tensor in once.values():
            tensor.zero_()
        return future

    def _same(self, store: Store, identity: str) -> None:
        assert same_bits(store.load(identity), self.model.points[identity].state)

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder)
            states = {identity: point.state for identity, point in self.model.points.items()}
            assert_tidied(self._open().store, states)
            self.model.assert_equals(self._open().store)


def module_of(state: State) -> torch.nn.Module:
    """Return a module that holds tensors as buffers."""
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    return module
