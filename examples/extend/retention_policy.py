"""Add a retention policy: keep a checkpoint now and then, by its training step.

Run ``python examples/extend/retention_policy.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from msft_store import Candidate, KeepLast, Policy, Reason, Store, Timeline


@dataclass(frozen=True)
class KeepEvery(Policy):
    """Keep the checkpoints whose step is a multiple of ``steps``; the newest is worth most."""

    steps: int

    def __post_init__(self) -> None:
        """Refuse a policy that cannot work before it deletes anything."""
        if self.steps < 1:
            raise ValueError(f"KeepEvery takes a number of steps from 1 up, not {self.steps}")

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        """Yield the kept candidates; the same candidates always give the same answer."""
        matching = [c for c in candidates if c.step is not None and c.step % self.steps == 0]
        for rank, candidate in enumerate(reversed(matching)):
            # A budget may drop it (protected=False), the one with the largest rank first.
            text = f"step {candidate.step} is a multiple of {self.steps}"
            yield candidate, Reason(text=text, protected=False, rank=rank)


def main() -> None:
    """Commit ten checkpoints and show which are kept, and why."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(f"{folder}/store")
        timeline = Timeline(store, None, retention=KeepEvery(4) | KeepLast(1))
        for step in range(1, 11):
            timeline.commit({"weight": torch.full((8,), float(step))}, step=step)
        kept = timeline.kept()
        for checkpoint in timeline.checkpoints():
            print(f"step {checkpoint.step}: {'; '.join(kept[checkpoint.id])}")
        timeline.close()


if __name__ == "__main__":
    main()
