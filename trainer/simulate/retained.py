"""Replay a retention policy: the rollback points that a run would have had at each evaluation.

The replay follows the rules of a timeline: the root of the branch is kept, and the policy decides
on the other checkpoints. A roll-back begins a new branch.

Sizes are those of each checkpoint at its commit. A timeline re-encodes the checkpoints that it
keeps at a roll-back, so their true sizes differ a little.

Example::

    replay = RetentionReplay(stored_bytes)
    replay.commit("b2f1", metrics, policy)
    replay.roll_back("b2f1", metrics, policy)
    replay.usages[-1].kept
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msft_store import Candidate, Policy


@dataclass(frozen=True, kw_only=True)
class RetentionUsage:
    """The rollback points at one commit, with the base, which takes no bytes."""

    kept: tuple[str, ...]
    """Ids after eviction, oldest first."""
    bytes: int | None
    """Size after eviction; ``None`` if the journal lacks the size of a checkpoint."""
    peak_bytes: int | None
    """Size before eviction."""
    peak: int
    """Number before eviction."""


@dataclass(frozen=True, kw_only=True)
class RetentionSummary:
    """The rollback points over all commits."""

    peak: int
    """Largest number, before eviction."""
    mean: float
    """Mean number, after eviction."""
    peak_bytes: int | None
    mean_bytes: float | None
    gone: tuple[str, ...]
    """Ids of roll-back targets that the policy had evicted."""


class RetentionReplay:
    """The rollback points of a run, updated by its commits and roll-backs."""

    def __init__(self, stored_bytes: Mapping[str, int]) -> None:
        """Begin without checkpoints; ``stored_bytes`` maps checkpoint ids to sizes."""
        self._sizes = stored_bytes
        self._kept: dict[str, Candidate] = {}
        self._root: str | None = None
        self._branch = 0
        self._index = 0
        self._gone: list[str] = []
        self.usages: list[RetentionUsage] = []

    def commit(self, checkpoint: str, metrics: Mapping[str, float], policy: Policy) -> None:
        """Add a checkpoint and evict the checkpoints that the policy does not keep."""
        self._add(checkpoint, metrics)
        peak, peak_bytes = len(self._kept), self._bytes(self._kept)
        self._evict(policy)
        self.usages.append(
            RetentionUsage(
                kept=tuple(self._kept),
                bytes=self._bytes(self._kept),
                peak_bytes=peak_bytes,
                peak=peak,
            )
        )

    def roll_back(self, checkpoint: str, metrics: Mapping[str, float], policy: Policy) -> None:
        """Begin a branch at a checkpoint, which is added again if it was evicted."""
        if checkpoint not in self._kept:
            self._gone.append(checkpoint)
        self._root, self._branch, self._index = checkpoint, self._branch + 1, 0
        self._add(checkpoint, metrics)
        self._evict(policy)

    def summarize(self) -> RetentionSummary:
        """Return peak and mean over the commits; there must be at least one."""
        sizes = [usage.bytes for usage in self.usages if usage.bytes is not None]
        peaks = [usage.peak_bytes for usage in self.usages if usage.peak_bytes is not None]
        known = len(sizes) == len(peaks) == len(self.usages)
        return RetentionSummary(
            peak=max(usage.peak for usage in self.usages),
            mean=statistics.fmean(len(usage.kept) for usage in self.usages),
            peak_bytes=max(peaks) if known else None,
            mean_bytes=statistics.fmean(sizes) if known else None,
            gone=tuple(self._gone),
        )

    def _add(self, checkpoint: str, metrics: Mapping[str, float]) -> None:
        self._kept[checkpoint] = Candidate(
            id=checkpoint,
            metrics=metrics,
            stored_bytes=self._sizes.get(checkpoint, 0),
            branch=self._branch,
            index=self._index,
        )
        self._index += 1

    def _evict(self, policy: Policy) -> None:
        keep = {*policy.rules(list(self._kept.values())), self._root}
        self._kept = {name: one for name, one in self._kept.items() if name in keep}

    def _bytes(self, names: Iterable[str]) -> int | None:
        sizes = [self._sizes.get(name) for name in names]
        return None if None in sizes else sum(size or 0 for size in sizes)
