"""Population-based training: the worst copy the best, and try another learning rate.

Jaderberg et al. (arXiv 1711.09846, section 3): every member trains by itself; now and then a member
of the worst copies weights and hyperparameters of one of the best (exploit) and changes them
(explore). Each member is a timeline of one store and keeps its newest checkpoint only, so the
winner's retention would give up what a loser is about to clone; a pin keeps it until that is done.

Members may be processes of their own: pins and timelines are files of the store.

Run it: ``python examples/rollback/population.py``
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import task

from msft_store import Base, Checkpoint, KeepLast, Store, Timeline


@dataclass
class Member:
    """One model that trains with a learning rate of its own."""

    name: str
    lr: float
    timeline: Timeline
    model: Any = field(default_factory=task.load_model)
    steps: int = 0
    score: float = float("inf")

    def train(self, steps: int) -> None:
        """Train, each member on batches of its own order."""
        seed = int.from_bytes(self.name.encode(), "big")
        optimizer = task.make_optimizer(self.model, self.lr)
        for step in range(self.steps, self.steps + steps):
            task.train_step(self.model, optimizer, task.batch(step, seed=seed))
        self.steps += steps

    def go_on(self, steps: int) -> None:
        """Train and commit."""
        self.train(steps)
        self.commit()

    def commit(self) -> Checkpoint:
        """Evaluate and commit; the member's previous checkpoint is evicted unless it is pinned."""
        metrics = task.evaluate_all(self.model)
        self.score = metrics["overall"]
        return self.timeline.commit(self.model, self.steps, metrics, {"lr": self.lr})


def exploit(store: Store, loser: Member, winner: Checkpoint, meanwhile: Callable[[], None]) -> None:
    """Let a loser go on from the winner's checkpoint, whatever the winner does ``meanwhile``."""
    store.pin(winner, f"population/for-{loser.name}")
    try:
        meanwhile()
        loser.timeline.rollback(winner, into=loser.model)
        loser.steps, loser.lr = winner.step or 0, float(winner.metadata["lr"])
    finally:
        store.unpin(f"population/for-{loser.name}")


def explore(loser: Member, chance: random.Random) -> None:
    """Change the learning rate that was copied."""
    loser.lr *= chance.choice((0.8, 1.25))


def evolve(
    store: Store,
    base: Base,
    rates: list[float],
    *,
    rounds: int = 3,
    steps: int = 6,
    report: Callable[[str], None] = print,
) -> list[Member]:
    """Train a population; return it, the best first."""
    chance = random.Random(0)  # noqa: S311
    members = [
        Member(name=name, lr=lr, timeline=Timeline(store, base, retention=KeepLast(1), name=name))
        for name, lr in ((f"m{at}", lr) for at, lr in enumerate(rates))
    ]
    for number in range(rounds):
        newest = {}
        for member in members:
            member.train(steps)
            newest[member.name] = member.commit()
        members.sort(key=lambda member: member.score)
        best, worst = members[0], members[-1]
        summary = ", ".join(f"{m.name} {m.score:.3f} (lr {m.lr:.1e})" for m in members)
        report(f"round {number}: {summary}")
        if number + 1 < rounds:
            # The winner trains on at once. Without the pin, its next commit would evict this one.
            exploit(store, worst, newest[best.name], partial(best.go_on, 1))
            explore(worst, chance)
            report(f"  {worst.name} goes on from {best.name} with lr {worst.lr:.1e}")
    return members


def main() -> None:
    """Train four members whose learning rates lie far apart."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(folder)
        base = store.add_base(task.BASE)
        evolve(store, base, [1e-6, 5e-6, 2e-5, 1e-4])
        stats = store.stats()
    print(f"{stats.checkpoints} checkpoints of 4 members", end=" ")
    print(f"in {stats.stored_bytes / base.logical_bytes:.2f} of one full checkpoint")


if __name__ == "__main__":
    main()
