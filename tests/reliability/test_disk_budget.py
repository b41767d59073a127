"""A timeline with a budget never exceeds it, and loses no protected checkpoint."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from msft_store import (
    Champions,
    Checkpoint,
    DiskBudget,
    KeepBest,
    KeepLast,
    OverBudgetError,
    PeakWindow,
    Policy,
    Store,
    Timeline,
)
from tests.support.invariants import assert_whole
from tests.support.ledger import Ledger
from tests.support.quota import QuotaBackend, bytes_on_disk
from tests.support.states import State, train_step, write_base

POLICIES: tuple[Policy, ...] = (
    Champions({"a": "max", "b": "min"}),
    Champions({"a": "max", "b": "min"}) | KeepBest("a") | KeepLast(3),
    PeakWindow({"a": "max", "b": "max"}, 2) | KeepBest("b"),
    KeepBest("a", 4),
    KeepLast(2),
)
BEST = (None, "a", "b", "a", None)
"""The metric whose best checkpoint over all branches each policy protects."""


def make_tensors(seed: int, width: int = 12_000) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {f"{n}.weight": torch.randn(width, generator=generator).bfloat16() for n in "ab"}


class History:
    """A timeline under a budget, with random commits and roll-backs and checks of its content."""

    def __init__(self, folder: Path, number: int, budget: int, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311
        self.state = make_tensors(seed)
        self.committed: dict[str, State] = {}
        """The states of committed checkpoints that may still be in the store, by id."""
        self.branch: list[Checkpoint] = []
        """The root, if it is a checkpoint, and every commit since."""
        self.ever: list[Checkpoint] = []
        self.refusals: list[str] = []
        self.dropped = 0
        self.number, self.budget = number, budget
        root = folder / "store"
        Store.create(root)
        base = write_base(folder / "base.safetensors", self.state)
        self.disk = QuotaBackend(root)
        self.store = Store(self.disk)
        policy = POLICIES[number] | DiskBudget(budget)
        self.line = Timeline(self.store, self.store.add_base(base), retention=policy)

    def commit(self, share: float, step: int) -> None:
        """Commit weights of which a share changed; with a share of 1, all of them."""
        state = make_tensors(step + 1) if share == 1 else train_step(self.state, share, step)
        metrics = {name: float(self.random.randint(0, 9)) for name in "ab"}
        newest = self.ever[-1:]
        try:
            ckpt = self.line.commit(state, step=step, metrics=metrics)
        except OverBudgetError as error:
            self.refusals.append(str(error))
            # A refused commit does not evict the commit before it.
            assert (
                not newest or newest[0].id not in self.committed or self.there() >= {newest[0].id}
            )
        else:
            self.state = self.committed[ckpt.id] = state
            self.branch.append(ckpt)
            self.ever.append(ckpt)
            self.look_back()
        self.check_kept()

    def there(self) -> set[str]:
        """Return the ids of the checkpoints in the store."""
        return {ckpt.id for ckpt in self.store.log()}

    def look_back(self) -> None:
        """Assert that the last commit or roll-back reported its evictions."""
        done = self.line.last_commit
        assert done is not None
        assert done.bytes <= done.peak_bytes <= self.budget
        assert self.there() == set(done.kept)
        assert not self.there() & set(done.dropped)
        self.dropped += len(done.dropped)

    def check_kept(self) -> None:
        """Assert that the store has all protected checkpoints, computed from the full history."""
        must = set()
        if isinstance(self.line.root, Checkpoint):
            must.add(self.line.root.id)
        best = BEST[self.number]
        if best is not None and self.ever:
            must.add(max(self.ever, key=lambda c: c.metrics[best]).id)
        if self.number < 2 and self.branch:
            must.add(max(self.branch, key=lambda c: c.metrics["a"]).id)
            must.add(min(self.branch, key=lambda c: c.metrics["b"]).id)
        assert must <= self.there()
        self.committed = {i: s for i, s in self.committed.items() if i in self.there()}

    def roll_back(self) -> None:
        """Roll back to a kept checkpoint, which always works."""
        if self.committed:
            target = self.random.choice(sorted(self.committed))
            self.state = self.line.rollback(target)
            assert isinstance(self.line.root, Checkpoint)
            assert self.line.root.id == target
            self.branch = [self.line.root]
            self.look_back()
            self.check_kept()

    def check(self) -> None:
        """Assert that no write exceeded the budget, and that every checkpoint is intact."""
        assert self.disk.largest <= max(self.budget, 0)
        assert bytes_on_disk(self.disk.root) <= self.budget
        assert_whole(Store.open(self.disk.root), self.committed)
        assert list((self.disk.root / "tmp").glob("*")) == []
        for refusal in self.refusals:
            assert "more do not fit" in refusal
            assert "would have been" in refusal


@pytest.mark.usefixtures("without_fsync")
def test_no_moment_exceeds_the_budget(
    tmp_path: Path, faults: Ledger, soak: bool, seed: int
) -> None:
    met = {"refused": 0, "dropped": 0, "all": 0}
    for number in range(600 if soak else 30):
        choice = random.Random(f"{seed} {number}")  # noqa: S311
        folder = tmp_path / str(number)
        folder.mkdir()
        budget = choice.randint(60_000, 200_000)
        history = History(folder, number % len(POLICIES), budget, choice.randrange(1 << 20))
        for step in range(10):
            with faults.inject("a commit or roll-back within a disk budget"):
                if choice.random() < 0.2:
                    history.roll_back()
                else:
                    history.commit(choice.choice([0.0, 0.01, 0.1, 0.5, 1, 1]), step)
        history.check()
        met["refused"] += len(history.refusals)
        met["dropped"] += history.dropped
        met["all"] += 10
        shutil.rmtree(folder)
    # The budgets were neither all too large nor all too small.
    assert min(met["refused"], met["dropped"]) > 10
    assert met["all"] > 3 * met["refused"]
