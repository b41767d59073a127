"""Replay a retention policy: the rollback points that a run would have had at each evaluation.

The replay follows the rules of a timeline: the root of the branch is kept, and the policy decides
on the other checkpoints. A roll-back begins a new branch.

Sizes are those of each checkpoint at its commit. A timeline re-encodes the checkpoints that it
keeps at a roll-back, so their true sizes differ a little.

Example::

    usages, gone = replay_retention(simulation, retention_named("last:2"), stored_bytes)
    summarize_retention(usages, gone).peak
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from msft_store import Candidate
from trainer.simulate.policies import Retention
from trainer.simulate.replay import Simulation


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


def replay_retention(
    simulation: Simulation, retention: Retention, sizes: Mapping[str, int]
) -> tuple[list[RetentionUsage], list[str]]:
    """Return the usage at each commit, and the ids of roll-back targets that were evicted.

    ``sizes`` maps checkpoint ids to bytes. An evicted target is added again.
    """
    usages: list[RetentionUsage] = []
    gone: list[str] = []
    candidates: dict[str, Candidate] = {}
    root, branch, index = None, 0, 0
    for change in simulation.changes:
        checkpoint = change.record["checkpoint"]
        if change.is_roll_back:
            if checkpoint not in candidates:
                gone.append(checkpoint)
            root, branch, index = checkpoint, branch + 1, 0
        candidates[checkpoint] = Candidate(
            id=checkpoint,
            metrics=change.record["metrics"],
            stored_bytes=sizes.get(checkpoint, 0),
            branch=branch,
            index=index,
        )
        index += 1
        policy = retention(change.needs, simulation.mode)
        keep = {*policy.rules(list(candidates.values())), root}
        kept = {name: one for name, one in candidates.items() if name in keep}
        if not change.is_roll_back:
            usage = RetentionUsage(
                kept=tuple(kept),
                bytes=_total(kept, sizes),
                peak_bytes=_total(candidates, sizes),
                peak=len(candidates),
            )
            usages.append(usage)
        candidates = kept
    return usages, gone


def summarize_retention(
    usages: Sequence[RetentionUsage], gone: Sequence[str]
) -> RetentionSummary | None:
    """Return peak and mean over the commits; ``None`` without a commit."""
    if not usages:
        return None
    sizes = [usage.bytes for usage in usages if usage.bytes is not None]
    peaks = [usage.peak_bytes for usage in usages if usage.peak_bytes is not None]
    known = len(sizes) == len(peaks) == len(usages)
    return RetentionSummary(
        peak=max(usage.peak for usage in usages),
        mean=statistics.fmean(len(usage.kept) for usage in usages),
        peak_bytes=max(peaks) if known else None,
        mean_bytes=statistics.fmean(sizes) if known else None,
        gone=tuple(gone),
    )


def _total(names: Collection[str], sizes: Mapping[str, int]) -> int | None:
    return sum(sizes[name] for name in names) if sizes.keys() >= set(names) else None
