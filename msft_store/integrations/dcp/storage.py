"""The store as a place for ``torch.distributed.checkpoint`` (DCP): DDP, FSDP2, tensor parallelism.

Every rank encodes what it holds and writes a pack of its own; the coordinator publishes one
manifest, and from then on the checkpoint exists. A rank that dies before leaves none, and nothing
but bytes that the next gc frees. A checkpoint may be loaded into any number of processes; it is one
like any other, for ``Store.load``, ``export`` and as the parent of others, sharded or not.

Values that are no tensors are kept as JSON (:func:`msft_store.flatten` says which can be), together
in a tensor of bytes named ``dcp.json``; nothing is pickled. That takes the planners of this module:
DCP's own pickle them, and are refused where there is such a value.

Example::

    import torch.distributed.checkpoint as dcp
    from msft_store.integrations.dcp.storage import LoadPlanner, SavePlanner, StorageReader,
    StorageWriter

    writer = StorageWriter("run/store", name="latest", parent=base, step=10)
    dcp.save({"model": model_state}, storage_writer=writer, planner=SavePlanner())
    reader = StorageReader("run/store", name="latest")
    dcp.load({"model": model_state}, storage_reader=reader, planner=LoadPlanner())
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.storage as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItemType,
)
from torch.distributed.checkpoint.planner import LoadPlanner as AnyLoadPlanner
from torch.distributed.checkpoint.planner import SavePlanner as AnySavePlanner
from torch.futures import Future

from msft_store.codec.codecs import Level
from msft_store.errors import (
    InvalidInputError,
    MismatchError,
    NotAStoreError,
    UnknownCheckpointError,
)
from msft_store.format.layout import canonical_json
from msft_store.integrations.dcp.boxes import box_of, boxes_of, size_of, tied
from msft_store.integrations.dcp.planners import (
    OBJECTS,
    LoadPlanner,
    SavePlanner,
    check_caching,
    pickling,
    roots_of,
)
from msft_store.maintenance.export_names import KEY as EXPORT
from msft_store.maintenance.export_names import root_of_model
from msft_store.objects.bases import Base
from msft_store.objects.catalog import CONFIG
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.objects.refs import check_ref_name
from msft_store.store import Store
from msft_store.tensors.boxes import Box, Part, Parts, whole_box
from msft_store.tensors.bytes import torch_dtype

__all__ = ["LoadPlanner", "SavePlanner", "StorageReader", "StorageWriter", "boxes_of"]


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What the coordinator tells every rank."""

    rank: int
    """Of whom it is told."""
    parent: str | None


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What a rank tells the coordinator."""

    part: Part
    json: Mapping[str, bytes]
    roots: frozenset[str]
    """As :func:`roots_of` gives them."""


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """What a rank tells the coordinator that could not write."""

    rank: int
    error: Exception
    trace: traceback.StackSummary


class StorageWriter(dcp.StorageWriter):
    """Where ``dcp.save`` and ``dcp.async_save`` write a checkpoint of a store.

    ``path`` is the store's directory on a file system that all ranks share; where there is none,
    the coordinator makes one. ``name`` is the ref that then points to the checkpoint, instead of
    another one; ``dcp.save(checkpoint_id=…)`` is the same. ``parent`` (a base, a checkpoint, an id
    or a ref) is what it is a change of; the rest is as in :meth:`Store.save`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        parent: Base | Checkpoint | str | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        level: Level | None = None,
    ) -> None:
        self._holding = contextlib.ExitStack()
        self.path = Path(path)
        self.name = None if name is None else check_ref_name(name)
        self.checkpoint: Checkpoint | None = None
        """What was saved last, in the coordinator."""
        self._parent = parent
        self._parent_id: str | None = None
        """Of the save under way, in the coordinator: a ref may move meanwhile."""
        self._level = level
        self._facts: dict[str, Any] = {
            "step": step,
            "metrics": metrics,
            "tags": tags,
            "metadata": metadata,
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another checkpoint, under another name if one is given."""
        self.close()
        if checkpoint_id is not None:
            self.name = check_ref_name(os.fspath(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the store, in the coordinator, if there is none."""
        if not kwargs.get("use_collectives", True):
            raise InvalidInputError(
                "without collectives nobody publishes the checkpoint: leave use_collectives=True"
            )
        if is_coordinator and not (self.path / CONFIG).exists():
            Store.create(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank what the checkpoint is a change of; hold off gc until it exists."""
        store = Store.open(self.path)
        with contextlib.ExitStack() as holding:
            holding.enter_context(store.awaiting_parts())
            self._parent_id = _parent_id(store, self._parent)
            self._holding = holding.pop_all()
        return [
            replace(plan, storage_data=_Order(rank=rank, parent=self._parent_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: AnySavePlanner) -> Future[list[dcp.WriteResult]]:
        """Encode what this rank holds into a pack of its own."""
        order: _Order = plan.storage_data
        results = [
            dcp.WriteResult(index=item.index, size_in_bytes=size_of(item), storage_data=None)
            for item in plan.items
        ]
        told: _Written | _Failed | None
        try:
            told = self._write(plan, planner, order) if results else None
        except Exception as error:
            # DCP would not call finish, and the coordinator would hold the store's lock on.
            told = _Failed(rank=order.rank, error=error, trace=_trace(error))
        if told is not None:
            results[0] = replace(results[0], storage_data=told)
        done: Future[list[dcp.WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, plan: SavePlan, planner: AnySavePlanner, order: _Order) -> _Written:
        check_caching(planner)
        values: dict[str, bytes] = {}
        boxes: list[Box] = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                if not isinstance(planner, SavePlanner):
                    raise pickling(item.index.fqn, "SavePlanner")
                values[item.index.fqn] = planner.json_of(item)
            else:
                boxes.append(box_of(item, planner.resolve_data(item)))
        try:
            store = Store.open(self.path)
        except NotAStoreError as error:
            raise NotAStoreError(
                f"rank {order.rank} finds no store at {self.path}, where the coordinator has one: "
                "give a path on a file system that all ranks share"
            ) from error
        part = store.encode([*boxes, *tied(boxes, planner)], parent=order.parent, level=self._level)
        own = {box.name: part.tensors[box.name] for box in boxes if box.name in part.tensors}
        return _Written(part=replace(part, tensors=own), json=values, roots=roots_of(planner))

    def finish(self, metadata: Metadata, results: list[list[dcp.WriteResult]]) -> None:
        """Publish the checkpoint, and point the ref to it.

        Where ranks could not write, ``CheckpointException`` with their errors.
        """
        told = [result.storage_data for of_rank in results for result in of_rank]
        failed = [each for each in told if isinstance(each, _Failed)]
        written = [each for each in told if isinstance(each, _Written)]
        with self._holding:
            if failed:
                raise CheckpointException(
                    "write", {each.rank: (each.error, each.trace) for each in failed}
                )
            self._publish(written)

    def _publish(self, written: Sequence[_Written]) -> None:
        parts = [each.part for each in written]
        values = {name: json.loads(text) for each in written for name, text in each.json.items()}
        store, parent = Store.open(self.path), self._parent_id
        if values:
            text = torch.frombuffer(bytearray(canonical_json(values)), dtype=torch.uint8)
            mine = [whole_box(OBJECTS, text)]
            parts.append(store.encode(mine, parent=parent, level=self._level))
        said: dict[str, str] = {"without": OBJECTS} if values else {}
        base, facts = parts[0].base if parts else None, dict(self._facts)
        if base is not None:
            shapes = {name: entry.shape for part in parts for name, entry in part.tensors.items()}
            roots = {root for each in written for root in each.roots}
            within = root_of_model(shapes, store.base(base), roots)
            said |= {"within": within} if within else {}
        if said:
            facts["metadata"] = {EXPORT: said, **(facts["metadata"] or {})}
        self.checkpoint = store.save(Parts(parts), parent=parent, **facts)
        if self.name is not None:
            store.pin(self.checkpoint, self.name)

    def close(self) -> None:
        """Give back what a save that failed in another rank still holds of the store."""
        self._holding.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # For DCP's saves in another process, before anything is held.
        return {**self.__dict__, "_holding": contextlib.ExitStack()}

    def storage_meta(self) -> StorageMeta | None:
        """Return the name."""
        return StorageMeta(checkpoint_id=self.name)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it can be the name of a ref."""
        try:
            check_ref_name(os.fspath(checkpoint_id))
        except InvalidInputError:
            return False
        return True


class StorageReader(dcp.StorageReader):
    """Where ``dcp.load`` reads a checkpoint of a store, into any number of processes.

    ``name`` is a ref, an id or a unique prefix of one; ``dcp.load(checkpoint_id=…)`` is the same.
    Any checkpoint can be read, also what ``Store.save`` made. Dtypes must be equal.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name
        self._opened: Store | None = None
        self._checkpoint: Checkpoint | None = None
        self._values: dict[str, Any] = {}
        self._tensors: dict[str, TensorEntry] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load, of another checkpoint if one is given."""
        if checkpoint_id is not None:
            self.name = os.fspath(checkpoint_id)
        self._checkpoint = None

    def read_metadata(self, *args: Any, **others: Any) -> Metadata:
        """Return the names, shapes, dtypes and boxes of what the checkpoint has."""
        # Of an argument named kwargs, DCP infers metadata of each rank, and asks again for that.
        if self.name is None:
            raise InvalidInputError("StorageReader needs a name: a ref, or the id of a checkpoint")
        store = self._opened = Store.open(self.path)
        found = self._checkpoint = store.get(self.name)
        self._tensors = store.tensors(found)
        self._values = {}
        if self._tensors.pop(OBJECTS, None) is not None:
            text = store.load(found, [OBJECTS])[OBJECTS]
            self._values = json.loads(text.numpy().tobytes())
        described: dict[str, Any] = {name: BytesStorageMetadata() for name in self._values}
        for name, entry in self._tensors.items():
            described[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=torch_dtype(entry.dtype)),
                size=torch.Size(entry.shape),
                chunks=[
                    ChunkStorageMetadata(
                        offsets=torch.Size(piece.offset), sizes=torch.Size(piece.shape)
                    )
                    for piece in entry.pieces
                ],
            )
        return Metadata(state_dict_metadata=described)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say which checkpoint this rank has found."""
        return replace(plan, storage_data=self._found()[1].id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse to load parts of several checkpoints."""
        if len({plan.storage_data for plan in plans}) > 1:
            raise MismatchError(f"{self.name!r} was moved while ranks looked it up; load again")
        return plans

    def read_data(self, plan: LoadPlan, planner: AnyLoadPlanner) -> Future[None]:
        """Fill the tensors of this rank, reading what holds something of them."""
        boxes: list[Box] = []
        targets: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                if not isinstance(planner, LoadPlanner):
                    raise pickling(name, "LoadPlanner")
                planner.load_bytes(item, io.BytesIO(json.dumps(self._values[name]).encode()))
                continue
            target = planner.resolve_tensor(item).detach()
            piece = item.storage_index.offset or torch.Size([0] * target.dim())
            offset = tuple(a + b for a, b in zip(piece, item.storage_offsets, strict=True))
            shape = self._tensors[name].shape
            boxes.append(Box(name=name, shape=shape, offset=offset, tensor=target))
            targets.append((item, target))
        store, found = self._found()
        store.load_boxes(found, boxes)
        for item, target in targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _found(self) -> tuple[Store, Checkpoint]:
        if self._opened is None or self._checkpoint is None:
            raise InvalidInputError("StorageReader is asked before read_metadata; use dcp.load")
        return self._opened, self._checkpoint

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it can be the name of a ref, or an id."""
        return StorageWriter.validate_checkpoint_id(checkpoint_id)


def _parent_id(store: Store, parent: Base | Checkpoint | str | None) -> str | None:
    if parent is None or isinstance(parent, (Base, Checkpoint)):
        return None if parent is None else parent.id
    try:
        return store.get(parent).id
    except UnknownCheckpointError:
        return store.base(parent).id


def _trace(error: Exception) -> traceback.StackSummary:
    # Without the code objects that frames have since Python 3.13, which cannot be sent.
    frames = traceback.extract_tb(error.__traceback__)
    return traceback.StackSummary.from_list(
        [(f.filename, f.lineno or 0, f.name, f.line) for f in frames]
    )
