"""Save the rollback points of a run, restore them, and keep its result.

A rollback point is a checkpoint on the run's timeline. With ``msft.optimizer_on_rollback=restore``
it also holds the optimizer's state and the random number generators. With ``async_save`` it is
saved in the background, and its journal record is written once it is durable.

Invariant: all processes make the same calls in the same order. Only the main process has a store
and a timeline; the other processes receive restored weights from it, or load their parts.

Example::

    point = RollbackPoint(stage=1, step=40, epoch=0.25, metrics=metrics)
    pending = save_rollback_point(work, point)
    work.journal_queue.add_later(pending.future, lambda: [("committed", pending.wait())])
    begin_stage(work, StageStart(stage=stage, root=checkpoint), policy)
"""

from __future__ import annotations

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
from trainer.errors import RunError
from trainer.model.sharding import Shards
from trainer.model.training_state import (
    add_training_state,
    gather_rng,
    restore_training_state,
    save_weights_only,
)
from trainer.model.weights import weights_of
from trainer.training.replay import StageStart
from trainer.training.workspace import RESULT, Workspace


@dataclass(frozen=True, kw_only=True)
class RollbackPoint:
    """The metadata of a rollback point."""

    stage: int
    step: int
    """Optimizer steps since the run began."""
    epoch: float
    metrics: Mapping[str, float]

    def as_arguments(self) -> tuple[int, Mapping[str, float], Mapping[str, Any]]:
        """Return the arguments of ``Timeline.commit`` between tensors and files."""
        return self.step, self.metrics, {"stage": self.stage, "epoch": self.epoch}


@dataclass(frozen=True, kw_only=True)
class PendingSave:
    """A rollback point that may not be durable yet."""

    future: Future[Checkpoint]
    timeline: Timeline
    point: RollbackPoint
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
            "step": self.point.step,
            "stage": self.point.stage,
            "checkpoint": checkpoint.id,
            "logical_bytes": checkpoint.logical_bytes,
            "stored_bytes": checkpoint.stored_bytes,
            "disk_peak_bytes": commit.peak_bytes,
            "disk_bytes": commit.bytes,
            "kept": {identity: list(reasons) for identity, reasons in commit.kept.items()},
            "dropped": list(commit.dropped),
            "seconds": self.seconds + time.monotonic() - began,
        }


def save_rollback_point(work: Workspace, point: RollbackPoint) -> PendingSave | None:
    """Commit the current state to the timeline; return ``None`` in all but the main process.

    Without ``async_save`` the checkpoint is durable when this returns.
    """
    began = time.monotonic()
    if work.shards is None:
        future = _save_model(work, point)
    else:
        future = _save_parts(work, work.shards, point)
    if work.timeline is None or future is None:
        return None
    seconds = time.monotonic() - began
    return PendingSave(future=future, timeline=work.timeline, point=point, seconds=seconds)


def _save_model(work: Workspace, point: RollbackPoint) -> Future[Checkpoint] | None:
    """Commit the main process's weights, in the background if configured."""
    with_state = work.config.restores_optimizer
    rng = gather_rng(work.accelerator) if with_state else {}
    if work.timeline is None:
        return None
    tensors = work.snapshots.take()
    if with_state:
        tensors = add_training_state(tensors, work.optimizer, rng)
    if work.config.async_save:
        return work.timeline.commit_async(tensors, *point.as_arguments(), work.files)
    future: Future[Checkpoint] = Future()
    future.set_result(work.timeline.commit(tensors, *point.as_arguments(), work.files))
    return future


def _save_parts(work: Workspace, shards: Shards, point: RollbackPoint) -> Future[Checkpoint] | None:
    """Commit the parts of all processes; the checkpoint is durable when this returns."""
    future: Future[Checkpoint] = Future()
    with shards.encode_parts(work.timeline, shards.make_boxes(work.snapshots.take())) as parts:
        if work.timeline is None:
            return None
        future.set_result(work.timeline.commit(parts, *point.as_arguments(), work.files))
    return future


def make_policy(needs: Needs, mode: Mode, names: Names | None = None) -> Policy:
    """Return the retention policy that keeps everything that a strategy may still use.

    ``names`` maps the strategy's names of checkpoints to ids.
    """
    policies: list[Policy] = [KeepBest(metric, 1, mode=mode) for metric in needs.best]
    champions = {name: needs.modes.get(name, mode) for name in needs.champions}
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


def keep_only_result(work: Workspace, checkpoint: str) -> None:
    """Restore the result's weights in all processes, and keep nothing else in the store.

    The result becomes the timeline's last root, so that restoring it needs nothing but the base.
    """
    if work.timeline is not None and work.store is not None:
        if work.config.restores_optimizer:
            checkpoint = save_weights_only(work.store, checkpoint, name=RESULT)
            work.timeline.retention = work.limit_policy(KeepLast(1))
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
