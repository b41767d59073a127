"""Where a run's resume point is kept: in one file, or in a store where no process has it whole.

All processes make the same calls in the same order. A new point replaces the one before at once:
whenever the run is killed, one of the two is there.

Example::

    save(work, point)                                   # bytes; 0 in all but the main process
    point = read(work)                                  # in the main process
    load(work)
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import torch

from msft_store import Box, Checkpoint, KeepLast, Store, Timeline
from msft_store.integrations.dcp import boxes_of
from trainer.files import sync
from trainer.model.sharding import Shards
from trainer.model.training_state import (
    gather_rng,
    load_optimizer,
    optimizer_tensors,
    set_python_rng,
    set_rng,
)
from trainer.model.weights import weights_of
from trainer.training.directory import RESUME, RESUME_STORE
from trainer.training.replay import (
    Point,
    content_of,
    load_point,
    point_of,
    read_position,
    save_point,
)
from trainer.training.workspace import Workspace

_NAME = "resume"
_WEIGHTS, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


def read(work: Workspace) -> Point | None:
    """Return the position of the resume point; ``None`` if there is none that can be used."""
    if work.shards is None:
        return read_position(work.directory / RESUME)
    newest = _newest(work)
    return None if newest is None else point_of(newest.metadata)


def save(work: Workspace, point: Point) -> int:
    """Replace the resume point by the state as it is; return its size in bytes.

    ``point`` is the main process's; the others write what they have of it.
    """
    rows = gather_rng(work.accelerator)
    if work.shards is not None:
        return _save_parts(work, work.shards, point, rows)
    if work.journal is None:
        return 0
    model = work.accelerator.unwrap_model(work.model)
    return save_point(work.directory / RESUME, point, model, work.optimizer, rows)


def load(work: Workspace) -> None:
    """Restore weights, optimizer and generators from the resume point."""
    if work.shards is None:
        model = work.accelerator.unwrap_model(work.model)
        rows = load_point(work.directory / RESUME, model, work.optimizer)
    else:
        rows = _load_parts(work, work.shards)
    set_rng(rows, work.accelerator)


def remove(work: Workspace) -> None:
    """Remove the resume point, in the main process."""
    (work.directory / RESUME).unlink(missing_ok=True)
    shutil.rmtree(work.directory / RESUME_STORE, ignore_errors=True)
    sync(work.directory)


def _timeline(work: Workspace) -> Timeline:
    path = work.directory / RESUME_STORE
    store = Store.open(path) if path.exists() else Store.create(path)
    return Timeline(store, None, retention=KeepLast(1), name=_NAME)


def _newest(work: Workspace) -> Checkpoint | None:
    if not (work.directory / RESUME_STORE).exists():
        return None
    return next(reversed(_timeline(work).checkpoints()), None)


def _save_parts(work: Workspace, shards: Shards, point: Point, rows: dict[str, Any]) -> int:
    timeline = None if work.journal is None else _timeline(work)
    work.accelerator.wait_for_everyone()
    boxes = [*_named(_WEIGHTS, shards.boxes(weights_of(work.loaded.model)))]
    boxes += _named(_OPTIMIZER, boxes_of(optimizer_tensors(work.optimizer)))
    if timeline is not None:
        boxes += _named(_RNG, boxes_of(rows))
    here = Shards(work.accelerator, work.loaded.model, work.directory / RESUME_STORE)
    with here.parts(timeline, boxes) as parts:
        if timeline is None:
            return 0
        timeline.commit(parts, point.position.global_step, metadata=content_of(point))
    done = timeline.last_commit
    return 0 if done is None else done.bytes


def _load_parts(work: Workspace, shards: Shards) -> dict[str, torch.Tensor]:
    found = None if work.journal is None else _newest(work)
    identity = shards.shared(None if found is None else found.id)
    store = Store.open(work.directory / RESUME_STORE)
    point = store.get(str(identity))
    entries = store.tensors(point)
    # What has the shape of its parameter is in parts, as that is; the rest is small.
    parameters = [p for group in work.optimizer.param_groups for p in group["params"]]
    parts: dict[str, torch.Tensor] = {}
    small = [name for name in entries if name.startswith(_RNG)]
    for name, entry in entries.items():
        if name.startswith(_OPTIMIZER):
            own = name.removeprefix(_OPTIMIZER)
            parameter = parameters[int(own.partition(".")[0])]
            if entry.shape == tuple(parameter.shape):
                parts[own] = torch.zeros_like(parameter)
            else:
                small.append(name)
    boxes = [*_named(_WEIGHTS, shards.boxes(weights_of(work.loaded.model)))]
    store.load_boxes(point, [*boxes, *_named(_OPTIMIZER, boxes_of(parts))])
    rest = store.load(point, small)
    scalars = {n.removeprefix(_OPTIMIZER): t for n, t in rest.items() if n.startswith(_OPTIMIZER)}
    load_optimizer(work.optimizer, {**parts, **scalars})
    set_python_rng(point.metadata["python"])
    return {n.removeprefix(_RNG): t for n, t in rest.items() if n.startswith(_RNG)}


def _named(prefix: str, boxes: list[Box]) -> list[Box]:
    return [replace(box, name=prefix + box.name) for box in boxes]
