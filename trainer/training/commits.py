"""Commits to the timeline: what is kept, and what the journal says of a commit.

With ``async_save`` a commit goes on in the background; its record waits until it is durable.

Example::

    work.timeline.retention = retention(strategy.needs(), strategy.mode)
    commit = begin_commit(work, stage=1, step=40, epoch=0.25, metrics=result.metrics)
    work.journal_queue.add_later(commit.future, lambda: [("committed", commit.record())])
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from msft_store import (
    Champions,
    Checkpoint,
    KeepBest,
    KeepLast,
    KeepThese,
    PeakWindow,
    Policy,
    Timeline,
)
from trainer.algorithms.base import Mode, Names, Needs
from trainer.errors import RunError
from trainer.model.sharding import Shards
from trainer.model.training_state import gather_rng, whole
from trainer.training.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Committing:
    """A commit that may still be under way."""

    future: Future[Checkpoint]
    timeline: Timeline
    step: int
    stage: int
    seconds: float
    """That training has waited for it so far."""

    def record(self) -> dict[str, Any]:
        """Wait until it is durable and return the fields of its ``committed`` record."""
        began = time.monotonic()
        checkpoint = self.future.result()
        commit = self.timeline.last_commit
        if commit is None:
            raise RunError("the store has not said what it did with the commit")
        return {
            "step": self.step,
            "stage": self.stage,
            "checkpoint": checkpoint.id,
            "logical_bytes": checkpoint.logical_bytes,
            "stored_bytes": checkpoint.stored_bytes,
            "disk_peak_bytes": commit.peak_bytes,
            "disk_bytes": commit.bytes,
            "kept": {identity: list(reasons) for identity, reasons in commit.kept.items()},
            "dropped": list(commit.dropped),
            "seconds": self.seconds + time.monotonic() - began,
        }


def begin_commit(
    work: Workspace, *, stage: int, step: int, epoch: float, metrics: Mapping[str, float]
) -> Committing | None:
    """Commit the state as it is now; ``None`` in every process but the main one.

    Without ``async_save`` it is done when this returns.
    """
    began = time.monotonic()
    facts = (step, metrics, {"stage": stage, "epoch": epoch})
    if work.shards is None:
        future = _commit_whole(work, facts)
    else:
        future = _commit_parts(work, work.shards, facts)
    if work.timeline is None or future is None:
        return None
    return Committing(
        future=future,
        timeline=work.timeline,
        step=step,
        stage=stage,
        seconds=time.monotonic() - began,
    )


_Facts = tuple[int, Mapping[str, float], Mapping[str, Any]]


def _commit_whole(work: Workspace, facts: _Facts) -> Future[Checkpoint] | None:
    """Commit the main process's weights, in the background if it is wanted."""
    restores = work.config.restores_optimizer
    rows = gather_rng(work.accelerator) if restores else {}
    if work.timeline is None:
        return None
    tensors = work.snapshots.take()
    if restores:
        tensors = whole(tensors, work.optimizer, rows)
    if work.config.async_save:
        return work.timeline.commit_async(tensors, *facts)
    future: Future[Checkpoint] = Future()
    future.set_result(work.timeline.commit(tensors, *facts))
    return future


def _commit_parts(work: Workspace, shards: Shards, facts: _Facts) -> Future[Checkpoint] | None:
    """Commit what all processes have, each its own; it is done when this returns."""
    future: Future[Checkpoint] = Future()
    with shards.parts(work.timeline, shards.boxes(work.snapshots.take())) as parts:
        if work.timeline is None:
            return None
        future.set_result(work.timeline.commit(parts, *facts))
    return future


def retention(needs: Needs, mode: Mode, names: Names | None = None) -> Policy:
    """Return the policy that keeps what a strategy may still ask for; ``names`` tells the ids."""
    policies: list[Policy] = [KeepBest(metric, 1, mode=mode) for metric in needs.best]
    champions = dict.fromkeys(needs.champions, mode)
    if champions and needs.peak_window is not None:
        policies.append(PeakWindow(champions, needs.peak_window))
    elif champions:
        policies.append(Champions(champions))
    if needs.newest:
        policies.append(KeepLast(1))
    if names is not None and (ids := names.ids(needs.checkpoints)):
        policies.append(KeepThese(ids))
    policy = policies[0]
    for other in policies[1:]:
        policy = policy | other
    return policy
