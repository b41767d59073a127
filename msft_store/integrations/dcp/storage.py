"""Use a store with ``torch.distributed.checkpoint`` (DCP): DDP, FSDP2, tensor parallelism.

Every rank encodes its tensors into a pack of its own. The coordinator then writes one manifest, and
from then on the checkpoint exists. A rank that dies before leaves no checkpoint, only bytes that
the next gc frees. A checkpoint can be loaded into any number of processes. It can be used like any
other: by ``Store.load``, by ``export`` and as the parent of others, sharded or not.

Values that are not tensors are kept as JSON (:func:`msft_store.flatten` states which values are
possible) in a tensor of bytes named ``dcp.json``; nothing is pickled. This needs the planners of
this package: DCP's own planner for saving pickles such values and is refused. Its planner for
loading expects them pickled, and gets them so from memory.

Example::

    import torch.distributed.checkpoint as dcp
    from msft_store.integrations.dcp import LoadPlanner, SavePlanner, StorageReader, StorageWriter

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
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner import LoadPlanner as BaseLoadPlanner
from torch.distributed.checkpoint.planner import SavePlanner as BaseSavePlanner
from torch.futures import Future

from msft_store.errors import (
    InvalidInputError,
    MismatchError,
    NotAStoreError,
    UnknownCheckpointError,
)
from msft_store.format.layout import canonical_json
from msft_store.integrations.dcp.boxes import count_bytes, find_tied_boxes, make_box
from msft_store.integrations.dcp.planners import (
    OBJECTS,
    PATHS,
    LoadPlanner,
    check_caching,
    check_can_write,
    find_roots,
    group_paths,
    paths_by_name,
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
from msft_store.tensors.files import check_files
from msft_store.tensors.names import AnyNames, plain_name
from msft_store.tensors.nested import unflatten


@dataclass(frozen=True, kw_only=True)
class _RankTask:
    """The task that the coordinator sends to a rank with its plan."""

    rank: int
    parent: str | None


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The result that a rank sends to the coordinator."""

    part: Part
    json: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """The error that a rank sends to the coordinator."""

    rank: int
    error: Exception
    trace: traceback.StackSummary


class StorageWriter(dcp.StorageWriter):
    """The storage writer of ``dcp.save`` and ``dcp.async_save`` for a store.

    ``checkpoint`` is the checkpoint that was saved last, in the coordinator; ``None`` elsewhere.
    The arguments that are not listed are those of :meth:`Store.save`.

    Args:
        path: The store's directory, on a file system that all ranks share. The coordinator
            makes a store if there is none.
        name: The ref that is moved to the new checkpoint; the same as
            ``dcp.save(checkpoint_id=…)``.
        parent: The base, checkpoint, id or ref from which the new checkpoint was trained.

    Raises:
        InvalidInputError: If the name cannot be that of a ref, or a file cannot be kept. During a
            save, errors of all ranks are raised as DCP's ``CheckpointException``.
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
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self._gc_hold = contextlib.ExitStack()
        self.path = Path(path)
        self.name = None if name is None else check_ref_name(name)
        self.checkpoint: Checkpoint | None = None
        self._parent = parent
        self._parent_id: str | None = None
        """The parent's id for the current save, in the coordinator. A ref may move meanwhile."""
        self._facts: dict[str, Any] = {
            "step": step,
            "metrics": metrics,
            "tags": tags,
            "metadata": metadata,
            "files": check_files(files),
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another checkpoint, under another name if one is given."""
        self.close()
        if checkpoint_id is not None:
            self.name = check_ref_name(os.fspath(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make a store in the coordinator if there is none."""
        if not kwargs.get("use_collectives", True):
            raise InvalidInputError(
                "without collectives no process writes the manifest: leave use_collectives=True"
            )
        if is_coordinator and not (self.path / CONFIG).exists():
            Store.create(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Send the parent's id to every rank, and block gc until the checkpoint exists."""
        names = {item.index.fqn for plan in plans for item in plan.items}
        if len(set(map(plain_name, names))) < len(names):
            raise InvalidInputError(
                "two names differ only in '_orig_mod', which torch.compile adds: rename one of them"
            )
        store = Store.open(self.path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(store.awaiting_parts())
            self._parent_id = _parent_id(store, self._parent)
            self._gc_hold = stack.pop_all()
        return [
            replace(plan, storage_data=_RankTask(rank=rank, parent=self._parent_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: BaseSavePlanner) -> Future[list[dcp.WriteResult]]:
        """Encode the tensors of this rank into a pack of its own."""
        task: _RankTask = plan.storage_data
        results = [
            dcp.WriteResult(index=item.index, size_in_bytes=count_bytes(item), storage_data=None)
            for item in plan.items
        ]
        outcome: _Written | _Failed | None
        try:
            outcome = self._write(plan, planner, task) if results else None
        except Exception as error:
            # If this raised, DCP would not call finish, and the coordinator would keep the lock.
            outcome = _Failed(rank=task.rank, error=error, trace=_trace(error))
        if outcome is not None:
            results[0] = replace(results[0], storage_data=outcome)
        done: Future[list[dcp.WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, plan: SavePlan, planner: BaseSavePlanner, task: _RankTask) -> _Written:
        check_caching(planner)
        values: dict[str, bytes] = {}
        boxes: list[Box] = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                name = item.index.fqn
                values[plain_name(name)] = check_can_write(name, planner).json_of(item)
            else:
                boxes.append(make_box(item, planner.resolve_data(item)))
        try:
            store = Store.open(self.path)
        except NotAStoreError as error:
            raise NotAStoreError(
                f"rank {task.rank} finds no store at {self.path}, but the coordinator does: "
                "use a path on a file system that all ranks share"
            ) from error
        named = [
            replace(box, name=plain_name(box.name))
            for box in (*boxes, *find_tied_boxes(boxes, planner))
        ]
        part = store.encode(named, parent=task.parent)
        names = [box.name for box in named[: len(boxes)] if box.name in part.tensors]
        own = {name: part.tensors[name] for name in names}
        return _Written(part=replace(part, tensors=own), json=values)

    def finish(self, metadata: Metadata, results: list[list[dcp.WriteResult]]) -> None:
        """Write the manifest and move the ref.

        Raises DCP's ``CheckpointException`` with the errors of the ranks that failed.
        """
        outcomes = [result.storage_data for of_rank in results for result in of_rank]
        failed = [each for each in outcomes if isinstance(each, _Failed)]
        written = [each for each in outcomes if isinstance(each, _Written)]
        with self._gc_hold:
            if failed:
                raise CheckpointException(
                    "write", {each.rank: (each.error, each.trace) for each in failed}
                )
            self._save(written, group_paths(metadata.planner_data))
        metadata.storage_meta = self.storage_meta()

    def _save(self, written: Sequence[_Written], groups: list[Any]) -> None:
        parts = [each.part for each in written]
        values = {name: json.loads(text) for each in written for name, text in each.json.items()}
        if groups:
            values[PATHS] = groups
        store, parent = Store.open(self.path), self._parent_id
        if values:
            text = torch.frombuffer(bytearray(canonical_json(values)), dtype=torch.uint8)
            boxes = [whole_box(OBJECTS, text)]
            parts.append(store.encode(boxes, parent=parent))
        settings: dict[str, str] = {"without": OBJECTS} if values else {}
        base, facts = parts[0].base if parts else None, dict(self._facts)
        if base is not None:
            shapes = {name: entry.shape for part in parts for name, entry in part.tensors.items()}
            within = root_of_model(shapes, store.base(base), find_roots(groups))
            settings |= {"within": within} if within else {}
        if settings:
            facts["metadata"] = {EXPORT: settings, **(facts["metadata"] or {})}
        self.checkpoint = store.save(Parts(parts), parent=parent, **facts)
        if self.name is not None:
            store.pin(self.checkpoint, self.name)

    def close(self) -> None:
        """Release the store's lock if a save failed in another rank."""
        self._gc_hold.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # DCP pickles the writer for saves in another process, before a lock is held.
        return {**self.__dict__, "_gc_hold": contextlib.ExitStack()}

    def storage_meta(self) -> StorageMeta | None:
        """Return the name of the checkpoint."""
        return StorageMeta(checkpoint_id=self.name)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return True if the id can be the name of a ref."""
        try:
            check_ref_name(os.fspath(checkpoint_id))
        except InvalidInputError:
            return False
        return True


class StorageReader(dcp.StorageReader):
    """The storage reader of ``dcp.load`` for a store. It loads into any number of processes.

    Any checkpoint can be loaded, also one that ``Store.save`` made. Targets must have the saved
    dtypes.

    Args:
        path: The store's directory.
        name: A ref, an id or a unique prefix of an id; the same as ``dcp.load(checkpoint_id=…)``.

    Raises:
        InvalidInputError: During a load, if there is no name. Errors of all ranks are raised as
            DCP's ``CheckpointException``.
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
        """Return the names, shapes, dtypes and boxes of the checkpoint's tensors."""
        # The parameter must not be named kwargs: DCP would then ask for each rank's metadata.
        if self.name is None:
            raise InvalidInputError("StorageReader needs a name: a ref, or the id of a checkpoint")
        store = self._opened = Store.open(self.path)
        found = self._checkpoint = store.get(self.name)
        self._tensors = AnyNames(store.tensors(found))
        self._values = {}
        if self._tensors.pop(OBJECTS, None) is not None:
            text = store.load(found, [OBJECTS])[OBJECTS]
            self._values = AnyNames(json.loads(text.numpy().tobytes()))
        paths = paths_by_name(self._values.pop(PATHS, []))
        described: AnyNames[Any] = AnyNames({name: BytesStorageMetadata() for name in self._values})
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
        return Metadata(
            state_dict_metadata=described,
            planner_data={name: paths.get(name, (name,)) for name in described},
            storage_meta=StorageMeta(checkpoint_id=self.name, save_id=found.id),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan with the id of the checkpoint that this rank found."""
        return replace(plan, storage_data=self._found()[1].id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raise an error if ranks found different checkpoints."""
        if len({plan.storage_data for plan in plans}) > 1:
            raise MismatchError(f"{self.name!r} was moved while the ranks read it; load again")
        return plans

    def read_data(self, plan: LoadPlan, planner: BaseLoadPlanner) -> Future[None]:
        """Fill the tensors of this rank. Only the pieces that overlap with them are read.

        The values that are not tensors are restored last. An error that does not come from damage
        is raised before anything is changed.
        """
        boxes: list[Box] = []
        values: list[tuple[ReadItem, io.BytesIO]] = []
        targets: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                values.append((item, _stream(self._values[name], planner)))
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
        for item, stream in values:
            planner.load_bytes(item, stream)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _found(self) -> tuple[Store, Checkpoint]:
        if self._opened is None or self._checkpoint is None:
            raise InvalidInputError("read_metadata was not called first; use dcp.load")
        return self._opened, self._checkpoint

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return True if the id can be the name of a ref, or an id."""
        return StorageWriter.validate_checkpoint_id(checkpoint_id)


def _parent_id(store: Store, parent: Base | Checkpoint | str | None) -> str | None:
    if parent is None or isinstance(parent, (Base, Checkpoint)):
        return None if parent is None else parent.id
    try:
        return store.get(parent).id
    except UnknownCheckpointError:
        return store.base(parent).id


def _stream(tree: Any, planner: BaseLoadPlanner) -> io.BytesIO:
    """Return a value in the form that the planner expects: JSON, or what DCP makes of it."""
    value = unflatten({}, tree)
    if isinstance(planner, LoadPlanner):
        return io.BytesIO(json.dumps(tree).encode())
    item = WriteItem(index=MetadataIndex(""), type=WriteItemType.BYTE_IO)
    stream: io.BytesIO = DefaultSavePlanner().transform_object(item, value)
    stream.seek(0)
    return stream


def _trace(error: Exception) -> traceback.StackSummary:
    # Leave out the code objects that frames have since Python 3.13: they cannot be pickled.
    frames = traceback.extract_tb(error.__traceback__)
    return traceback.StackSummary.from_list(
        [(f.filename, f.lineno or 0, f.name, f.line) for f in frames]
    )
