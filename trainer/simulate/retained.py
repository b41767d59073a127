"""Replay a retention policy: the rollback points that a run would have had at each evaluation.

The replay follows the rules of a timeline: the root of the branch is kept, and the policy decides
on the other checkpoints. A roll-back begins a new branch.

Sizes are those of each checkpoint at its commit. A timeline re-encodes the checkpoints that it
keeps at a roll-back, so their true sizes differ a little.

Example::

    usages, gone = replay_retention(simulation, retention_named("last:2"), stored_bytes)
    summarize_retention(usages, gone, stored_bytes).peak
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msft_store import Candidate
from trainer.algorithms.base import measured
from trainer.simulate.policies import Retention
from trainer.simulate.replay import Simulation


@dataclass(frozen=True, kw_only=True)
class RetentionUsage:
    """The ids of the rollback points at one commit, oldest first, with the base."""

    before: tuple[str, ...]
    """Those before eviction."""
    kept: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RetentionSummary:
    """The rollback points over all commits: peaks before eviction, means after it."""

    peak: int
    mean: float
    peak_bytes: int | None
    """``None`` if the journal lacks the size of a checkpoint."""
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
            metrics=measured(change.record["metrics"], change.record.get("carried") or ()),
            stored_bytes=sizes.get(checkpoint, 0),
            branch=branch,
            index=index,
        )
        index += 1
        policy = retention(change.needs, simulation.mode)
        keep = {*policy.rules(list(candidates.values())), root}
        kept = {name: one for name, one in candidates.items() if name in keep}
        if not change.is_roll_back:
            usages.append(RetentionUsage(before=tuple(candidates), kept=tuple(kept)))
        candidates = kept
    return usages, gone


def summarize_retention(
    usages: Sequence[RetentionUsage], gone: Sequence[str], sizes: Mapping[str, int]
) -> RetentionSummary | None:
    """Return peak and mean over the commits; ``None`` without a commit."""
    if not usages:
        return None
    known = all(sizes.keys() >= set(usage.before) for usage in usages)
    peaks = [sum(sizes.get(name, 0) for name in usage.before) for usage in usages]
    kept = [sum(sizes.get(name, 0) for name in usage.kept) for usage in usages]
    return RetentionSummary(
        peak=max(len(usage.before) for usage in usages),
        mean=statistics.fmean(len(usage.kept) for usage in usages),
        peak_bytes=max(peaks) if known else None,
        mean_bytes=statistics.fmean(kept) if known else None,
        gone=tuple(gone),
    )
