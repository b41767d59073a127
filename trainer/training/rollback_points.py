"""Save the rollback points of a run, restore them, and keep its result.

A rollback point is a checkpoint on the run's timeline. With ``msft.optimizer_on_rollback=restore``
it also holds the optimizer's state and the random number generators. With ``async_save`` it is
saved in the background, and its journal record is written once it is durable.

Invariant: all processes make the same calls in the same order. Only the main process has a store
and a timeline; the other processes receive restored weights from it, or load their parts.

Example::

    pending = save_rollback_point(work, stage=1, step=40, epoch=0.25, metrics=metrics)
    work.journal_queue.add_later(pending.future, lambda: [("committed", pending.wait())])
    begin_stage(work, StageStart(stage=stage, root=checkpoint), policy)
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast

from msft_store import (
    Champions,
    Checkpoint,
    KeepBest,
    KeepLast,
    KeepThese,
    PeakWindow,
    Policy,
    Store,
    Timeline,
)
from trainer.algorithms.base import Mode, Names, Needs
from trainer.distributed import share
from trainer.errors import RunError
from trainer.model.training_state import (
    gather_training_state,
    restore_training_state,
    save_weights_only,
)
from trainer.model.weights import weights_of
from trainer.training.replay import StageStart
from trainer.training.workspace import RESULT, Workspace

AVERAGE = "average"
"""The ref of a mean of checkpoints until the model has its weights."""


@dataclass(frozen=True, kw_only=True)
class PendingSave:
    """A rollback point that may not be durable yet."""

    future: Future[Checkpoint]
    timeline: Timeline
    stage: int
    step: int
    seconds: float
    """Seconds that training has waited for it so far."""

    def wait(self) -> dict[str, Any]:
        """Wait until the checkpoint is durable; return the fields of its ``committed`` record."""
        began = time.monotonic()
        checkpoint = self.future.result()
        commit = self.timeline.last_commit
        if commit is None:
            raise RunError(f"the timeline has no report on its commit of {checkpoint.id}")
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


def save_rollback_point(
    work: Workspace, *, stage: int, step: int, epoch: float, metrics: Mapping[str, float]
) -> PendingSave | None:
    """Commit the current state to the timeline; return ``None`` in all but the main process.

    Without ``async_save``, and for a sharded model, the checkpoint is durable when this returns.
    """
    began, timeline, shards = time.monotonic(), work.timeline, work.shards
    with_state = work.config.restores_optimizer
    state = gather_training_state(work.optimizer) if with_state else {}
    facts = (step, metrics, {"stage": stage, "epoch": epoch}, work.files)
    future: Future[Checkpoint] = Future()
    if shards is not None:
        with shards.encode_parts(timeline, shards.make_boxes(work.snapshots.take())) as parts:
            if timeline is not None:
                future.set_result(timeline.commit(parts, *facts))
    elif timeline is not None:
        tensors = {**work.snapshots.take(), **state}
        if work.config.async_save:
            future = timeline.commit_async(tensors, *facts)
        else:
            future.set_result(timeline.commit(tensors, *facts))
    if timeline is None:
        return None
    seconds = time.monotonic() - began
    return PendingSave(future=future, timeline=timeline, stage=stage, step=step, seconds=seconds)


def make_policy(needs: Needs, mode: Mode, names: Names | None = None) -> Policy:
    """Return the retention policy that keeps everything that a strategy may still use.

    ``names`` maps the strategy's names of checkpoints to ids; without it they are ids.
    """
    policies: list[Policy] = [KeepBest(metric, 1, mode=mode) for metric in needs.best]
    champions = {name: needs.modes.get(name, mode) for name in needs.champions}
    if champions and needs.peak_window is not None:
        policies.append(PeakWindow(champions, needs.peak_window))
    elif champions:
        policies.append(Champions(champions))
    if needs.newest:
        policies.append(KeepLast(1))
    ids = frozenset(needs.checkpoints) if names is None else names.ids(needs.checkpoints)
    if ids:
        policies.append(KeepThese(ids))
    return functools.reduce(operator.or_, policies)


def begin_stage(work: Workspace, start: StageStart, policy: Policy) -> None:
    """Restore a stage's root in all processes; a root of ``None`` stands for the base's weights.

    The timeline has a branch for each stage. It rolls back to the root, or if it did so before a
    kill, it forgets the commits of the stage.
    """
    root = start.root
    with_state = root is not None and work.config.restores_optimizer
    tensors: dict[str, torch.Tensor] = {}
    if work.timeline is not None and work.store is not None:
        work.timeline.retention = work.limit_policy(policy)
        if root is None:
            work.timeline.rewind(0)
        elif work.timeline.branch < start.stage.number - 1:
            tensors = _roll_back(work, work.timeline, root, with_state=with_state)
        else:
            work.timeline.rewind(1)
            tensors = _load(work, work.store, root, with_state=with_state)
    _share(work, tensors, root, with_state=with_state)


def restore_point(work: Workspace, checkpoint: str) -> None:
    """Restore a rollback point of the current stage in all processes; the stage continues."""
    with_state = work.config.restores_optimizer
    tensors = {}
    if work.store is not None:
        tensors = _load(work, work.store, checkpoint, with_state=with_state)
    _share(work, tensors, checkpoint, with_state=with_state)


def restore_average(work: Workspace, weights: Mapping[str, float]) -> None:
    """Give the model the weighted mean of checkpoints (ids → weights), in all processes.

    The mean is in the store only until it is restored; the caller commits it like other weights.
    """
    found = ""
    if work.store is not None:
        drop_average(work.store)
        mean = work.store.average(weights, list(weights.values()))
        work.store.pin(mean, AVERAGE)
        found = mean.id
    found = share(found)
    restore_point(work, found)
    work.accelerator.wait_for_everyone()  # each may load its part of the mean by itself
    if work.store is not None:
        drop_average(work.store)


def drop_average(store: Store) -> None:
    """Delete the mean of :func:`restore_average`, also that of a process that was killed."""
    if AVERAGE in store.refs():
        mean = store.get(AVERAGE).id
        store.unpin(AVERAGE)
        store.evict([mean])


def keep_only_result(work: Workspace, checkpoint: str) -> None:
    """Restore the result's weights in all processes, and keep nothing else in the store.

    The result becomes the timeline's last root, so that restoring it needs nothing but the base.
    """
    if work.timeline is not None and work.store is not None:
        drop_average(work.store)
        if work.config.restores_optimizer:
            checkpoint = save_weights_only(work.store, checkpoint, name=RESULT)
        work.timeline.retention = work.limit_policy(KeepThese(frozenset({checkpoint})))
        work.store.pin(checkpoint, RESULT)
        _roll_back(work, work.timeline, checkpoint, with_state=False)
    _share(work, {}, checkpoint, with_state=False)


def _roll_back(
    work: Workspace, timeline: Timeline, checkpoint: str, *, with_state: bool
) -> dict[str, torch.Tensor]:
    """Roll back to a checkpoint; return all its tensors if it holds more than weights."""
    tensors: dict[str, torch.Tensor] = {}
    if with_state:
        # The timeline would renew the resident copy from these tensors, which are on the host and
        # include the optimizer's. A new copy is taken from the restored weights instead.
        timeline.resident = None
        tensors = timeline.rollback(checkpoint)
        work.snapshots.restore(tensors)
        timeline.resident = work.make_resident()
    else:
        buffers = work.snapshots.make_buffers()
        into = buffers if work.shards is None else work.shards.make_boxes(buffers)
        timeline.rollback(checkpoint, into=into)
        work.snapshots.restore(buffers)
    report = timeline.last_commit
    if report is not None:
        sizes = {"disk_peak_bytes": report.peak_bytes, "disk_bytes": report.bytes}
        work.record("rolled_back", checkpoint=checkpoint, **sizes)
    return tensors


def _load(
    work: Workspace, store: Store, checkpoint: str, *, with_state: bool
) -> dict[str, torch.Tensor]:
    """Load a checkpoint without a new branch; return all tensors if it holds more than weights."""
    if with_state:
        return store.load(checkpoint)
    buffers = work.snapshots.make_buffers()
    if work.shards is None:
        store.load_into(buffers, checkpoint)
    else:
        store.load_boxes(checkpoint, work.shards.make_boxes(buffers))
    work.snapshots.restore(buffers)
    return {}


def _share(
    work: Workspace,
    tensors: dict[str, torch.Tensor],
    checkpoint: str | None,
    *,
    with_state: bool,
) -> None:
    """Give all processes the main process's state, or let each load its part of the checkpoint."""
    if with_state:
        if tensors:
            work.snapshots.restore(tensors)
        restore_training_state(tensors, work.optimizer, work.accelerator)
    if work.shards is not None:
        work.accelerator.wait_for_everyone()
        if checkpoint is not None and work.store is None:
            buffers = work.snapshots.make_buffers()
            work.shards.load(checkpoint, buffers)
            work.snapshots.restore(buffers)
    elif work.accelerator.num_processes > 1:
        for tensor in weights_of(work.loaded.model).values():
            broadcast(tensor)
