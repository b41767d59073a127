"""Replay a retention policy: the rollback points that a run would have held at each evaluation.

The replay follows the rule of a timeline on the journal: the branch's root stays, and the policy
decides on the others. A roll-back begins a branch with champions of its own.

Bytes are those of each checkpoint at its commit. A timeline re-encodes checkpoints that survive a
roll-back, so their true size differs a little; the journal has it only for the run itself.

Example::

    holding = RetentionReplay(stored_bytes)
    holding.commit("b2f1", metrics, policy)
    holding.roll_back("b2f1", policy)
    holding.points[-1].alive
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from msft_store import Candidate, Policy


@dataclass(frozen=True, kw_only=True)
class Held:
    """The rollback points at one commit; the base, which costs nothing, among them."""

    alive: tuple[str, ...]
    """Ids after eviction, oldest first."""
    bytes: int | None
    """Of those; ``None`` where the journal lacks the size of one."""
    peak_bytes: int | None
    """Before eviction."""
    peak: int
    """How many were there before eviction."""


@dataclass(frozen=True, kw_only=True)
class HeldTotal:
    """The rollback points over all commits."""

    peak: int
    """The most at once, the new one before eviction included."""
    mean: float
    """After eviction."""
    peak_bytes: int | None
    mean_bytes: float | None
    gone: tuple[str, ...]
    """Ids that were gone back to, but that the policy no longer kept."""


class RetentionReplay:
    """The rollback points of a run, as commits and roll-backs come."""

    def __init__(self, stored_bytes: Mapping[str, int]) -> None:
        """Begin with none; ``stored_bytes`` are by checkpoint id."""
        self._sizes = stored_bytes
        self._alive: dict[str, Candidate] = {}
        self._root: str | None = None
        self._branch = 0
        self._next = 0
        self._gone: list[str] = []
        self.points: list[Held] = []

    def commit(self, checkpoint: str, metrics: Mapping[str, float], policy: Policy) -> None:
        """Add a checkpoint and evict what the policy does not keep."""
        self._alive[checkpoint] = Candidate(
            id=checkpoint,
            metrics=metrics,
            stored_bytes=self._sizes.get(checkpoint, 0),
            branch=self._branch,
            index=self._next,
        )
        self._next += 1
        before = tuple(self._alive)
        self._evict(policy)
        self.points.append(
            Held(
                alive=tuple(self._alive),
                bytes=self._bytes(self._alive),
                peak_bytes=self._bytes(dict.fromkeys(before)),
                peak=len(before),
            )
        )

    def roll_back(self, checkpoint: str, metrics: Mapping[str, float], policy: Policy) -> None:
        """Begin a branch at a checkpoint; it is taken back where the policy no longer had it."""
        if checkpoint not in self._alive:
            self._gone.append(checkpoint)
        self._root, self._branch, self._next = checkpoint, self._branch + 1, 1
        self._alive[checkpoint] = Candidate(
            id=checkpoint,
            metrics=metrics,
            stored_bytes=self._sizes.get(checkpoint, 0),
            branch=self._branch,
        )
        self._evict(policy)

    def total(self) -> HeldTotal:
        """Return peak and mean over the commits, of which there must be one."""
        sizes = [point.bytes for point in self.points if point.bytes is not None]
        peaks = [point.peak_bytes for point in self.points if point.peak_bytes is not None]
        count = len(self.points)
        known = len(sizes) == len(peaks) == count
        return HeldTotal(
            peak=max(point.peak for point in self.points),
            mean=math.fsum(len(point.alive) for point in self.points) / count,
            peak_bytes=max(peaks) if known else None,
            mean_bytes=math.fsum(sizes) / count if known else None,
            gone=tuple(self._gone),
        )

    def _evict(self, policy: Policy) -> None:
        kept = {*policy.rules(list(self._alive.values())), self._root}
        self._alive = {name: one for name, one in self._alive.items() if name in kept}

    def _bytes(self, names: Mapping[str, object]) -> int | None:
        if any(name not in self._sizes for name in names):
            return None
        return sum(self._sizes[name] for name in names)
