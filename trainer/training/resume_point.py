"""Write and read a run's resume point: the full state after an optimizer step.

It holds weights, optimizer and random generators as tensors, and the position as JSON. It
belongs to the journal up to record ``seq``. An unsharded run keeps it in one safetensors file. A
sharded run, in which no process has the whole model, keeps it in a store.

Invariants: all processes make the same calls in the same order. A new resume point replaces the
last one atomically, so a kill at any moment leaves one of them.

Example::

    save(work, point)                                   # bytes; 0 in all but the main process
    point = read(work)                                  # in the main process
    load(work)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msft_store import Box, Checkpoint, KeepLast, Store, Timeline
from msft_store.integrations.dcp import boxes_of
from msft_store.integrations.training_state import from_tensors
from trainer.distributed import share
from trainer.files import enough_space, sync
from trainer.model.sharding import Shards
from trainer.model.training_state import (
    gather_rng,
    load_optimizer,
    optimizer_tensors,
    set_rng,
    strip_prefix,
)
from trainer.model.weights import drop_tied, weights_of
from trainer.training.directory import RESUME, RESUME_STORE
from trainer.training.replay import Position, ResumePoint
from trainer.training.workspace import Workspace

_VERSION = 2
_NAME = "resume"
_PARTIAL = f".{RESUME}.partial"
_WEIGHTS, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng"


def read(work: Workspace) -> ResumePoint | None:
    """Return the position of the resume point, or ``None`` if there is no usable one."""
    if work.shards is not None:
        newest = _newest_checkpoint(work)
        return None if newest is None else _parse_content(newest.metadata)
    try:
        return _parse_content(_read_content(work.directory / RESUME))
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def save(work: Workspace, point: ResumePoint) -> int:
    """Replace the resume point by the current state, and return its size in bytes.

    ``point`` is the main process's; the other processes write their parts of the state.
    """
    rng = gather_rng(_RNG)
    if work.shards is not None:
        return _save_parts(work, work.shards, point, rng)
    if work.journal is None:
        return 0
    weights = drop_tied(weights_of(work.accelerator.unwrap_model(work.model)))
    tensors = {
        **{_WEIGHTS + name: tensor for name, tensor in weights.items()},
        **{_OPTIMIZER + name: t for name, t in optimizer_tensors(work.optimizer).items()},
        **rng,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = work.directory / RESUME
    # safetensors writes to a temporary file of its own beside this one. After a kill nobody knows
    # its name, so both are in a folder, which the next save deletes.
    temporary = work.directory / _PARTIAL / path.name
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with enough_space("the resume point", path, needed_bytes=needed):
        try:
            shutil.rmtree(temporary.parent, ignore_errors=True)
            temporary.parent.mkdir()
            save_file(tensors, temporary, metadata={"msft": json.dumps(_make_content(point))})
            sync(temporary)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        sync(path.parent)
    return path.stat().st_size


def load(work: Workspace) -> None:
    """Restore weights, optimizer and generators from the resume point."""
    if work.shards is not None:
        set_rng(from_tensors(_load_parts(work, work.shards), _RNG), work.accelerator)
        return
    path = work.directory / RESUME
    weights = weights_of(work.accelerator.unwrap_model(work.model))
    tensors = {}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.startswith(_WEIGHTS):
                weights[name.removeprefix(_WEIGHTS)].copy_(file.get_tensor(name))
            else:
                tensors[name] = file.get_tensor(name)
    load_optimizer(work.optimizer, strip_prefix(_OPTIMIZER, tensors))
    set_rng(from_tensors(tensors, _RNG), work.accelerator)


def delete(work: Workspace) -> None:
    """Delete the resume point, in the main process."""
    (work.directory / RESUME).unlink(missing_ok=True)
    for folder in (RESUME_STORE, _PARTIAL):
        shutil.rmtree(work.directory / folder, ignore_errors=True)
    sync(work.directory)


def _make_content(point: ResumePoint) -> dict[str, Any]:
    """Return the part of a resume point that is not tensors, as JSON values."""
    return {"version": _VERSION, "seq": point.seq, "position": asdict(point.position)}


def _parse_content(content: Mapping[str, Any]) -> ResumePoint | None:
    """Return the position in a resume point's content, or ``None`` if it is not usable."""
    try:
        position = Position(**content["position"])
        point = ResumePoint(position=position, seq=content["seq"])
        return point if content["version"] == _VERSION else None
    except (KeyError, TypeError):
        return None


def _read_content(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["msft"])


def _open_timeline(work: Workspace) -> Timeline:
    path = work.directory / RESUME_STORE
    store = Store.open(path) if path.exists() else Store.create(path)
    return Timeline(store, None, retention=KeepLast(1), name=_NAME)


def _newest_checkpoint(work: Workspace) -> Checkpoint | None:
    if not (work.directory / RESUME_STORE).exists():
        return None
    return next(reversed(_open_timeline(work).checkpoints()), None)


def _save_parts(work: Workspace, shards: Shards, point: ResumePoint, rng: dict[str, Any]) -> int:
    timeline = None if work.journal is None else _open_timeline(work)
    work.accelerator.wait_for_everyone()
    boxes = _add_prefix(_WEIGHTS, shards.make_boxes(weights_of(work.loaded.model)))
    boxes += _add_prefix(_OPTIMIZER, boxes_of(optimizer_tensors(work.optimizer)))
    if timeline is not None:
        boxes += boxes_of(rng)
    resume_shards = Shards(work.accelerator, work.loaded.model, work.directory / RESUME_STORE)
    with resume_shards.encode_parts(timeline, boxes) as parts:
        if timeline is None:
            return 0
        timeline.commit(parts, point.position.global_step, metadata=_make_content(point))
    report = timeline.last_commit
    return 0 if report is None else report.bytes


def _load_parts(work: Workspace, shards: Shards) -> dict[str, torch.Tensor]:
    newest = None if work.journal is None else _newest_checkpoint(work)
    identity = share(None if newest is None else newest.id)
    store = Store.open(work.directory / RESUME_STORE)
    checkpoint = store.get(str(identity))
    entries = store.tensors(checkpoint)
    # Optimizer state with the shape of its parameter is sharded like the parameter. Each process
    # loads its part of that, and the whole of everything else, which is small.
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
    boxes = _add_prefix(_WEIGHTS, shards.make_boxes(weights_of(work.loaded.model)))
    store.load_boxes(checkpoint, boxes + _add_prefix(_OPTIMIZER, boxes_of(parts)))
    loaded = store.load(checkpoint, small)
    load_optimizer(work.optimizer, {**parts, **strip_prefix(_OPTIMIZER, loaded)})
    return loaded


def _add_prefix(prefix: str, boxes: list[Box]) -> list[Box]:
    return [replace(box, name=prefix + box.name) for box in boxes]
