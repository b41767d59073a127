"""A process that works on a store is killed at random times; the checkpoints it reported exist."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from msft_store import Store
from tests.support.invariants import assert_tidied
from tests.support.ledger import Ledger
from tests.support.states import write_base
from tests.support.worker import MARK, NAME, Worker, start, state_of

ROOT = f"timelines/{NAME}/root"


@dataclass
class Promised:
    """The content that a store must have according to the reports of its processes."""

    saved: set[str] = field(default_factory=set)
    refs: dict[str, set[str]] = field(default_factory=dict)
    """The possible targets of each ref: those it was moved to or may have been (``""``: none)."""
    best: float = 0.0
    """The timeline's best score ever reported."""

    def hear(self, messages: list[dict[str, object]]) -> None:
        """Record the messages that a process sent before it died."""
        moves = {"pin": MARK, "roll back": ROOT}
        for line in messages:
            begun, done, about = line.get("begun"), line.get("done"), str(line.get("about"))
            if done == "save":
                self.saved.add(str(line["id"]))
            elif begun == "forget":
                self.saved.discard(about)
            elif done == "commit":
                self.best = max(self.best, float(str(line["score"])))
            elif begun in moves:
                self.refs.setdefault(moves[begun], {""}).add(about)
            elif done in moves:
                self.refs[moves[done]] = {about}

    def verify(self, store: Store) -> None:
        """Assert that every reported checkpoint exists, and that every checkpoint is exact."""
        log = store.log()
        exact = {ckpt.id: state_of(ckpt.step) for ckpt in log if ckpt.step is not None}
        assert len(exact) == len(log)
        assert self.saved <= exact.keys(), "a save is lost"
        refs = store.refs()
        for name, targets in self.refs.items():
            assert refs.get(name, "") in targets
        scores = [ckpt.metrics["score"] for ckpt in log if ckpt.metadata]
        assert max(scores, default=0.0) >= self.best, "the best commit is lost"
        assert_tidied(store, exact)


@pytest.mark.usefixtures("without_fsync")
def test_reported_checkpoints_survive_a_kill(
    tmp_path: Path, faults: Ledger, seed: int, soak: bool
) -> None:
    path = tmp_path / "store"
    base = Store.create(path).add_base(write_base(tmp_path / "base.safetensors", start())).id
    rng = random.Random(seed)  # noqa: S311
    promised, done = Promised(), 0
    for number in range(400 if soak else 36):
        worker = Worker(path, base, seed=1000 * seed + number)
        worker.kill_after(lines=rng.randrange(24), delay=0.02 * rng.random())
        errors = [line["error"] for line in worker.messages if "error" in line]
        assert not errors, errors[0]
        with faults.inject("kill -9 of a saving process"):
            promised.hear(worker.messages)
            promised.verify(Store.open(path))
        done += sum("done" in line for line in worker.messages)
    assert done > number
