"""The public interface of a store: save, load, pin, check and delete checkpoints.

Invariants: ``save`` never deletes. A checkpoint is durable once ``save`` returns, and invisible
before. ``load`` returns exactly the bits that were saved, because every chunk is verified against
its key.

Example::

    store = Store.create("run/store")
    base = store.add_base("Qwen2.5-0.5B")
    ckpt = store.save(model.state_dict(), parent=base, step=10, metrics={"arith": 0.41})
    store.load_into(model, ckpt)
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from msft_store._util import PathLike, check_path
from msft_store.errors import (
    CorruptedError,
    InvalidInputError,
    PinnedError,
    UnknownCheckpointError,
)
from msft_store.format.layout import NEWEST
from msft_store.maintenance.check import Finding, Report, examine
from msft_store.maintenance.diff import TensorDiff, diff
from msft_store.maintenance.export import export
from msft_store.maintenance.export_files import read_files
from msft_store.maintenance.export_names import KEY as EXPORT
from msft_store.maintenance.gc import GcPlan, GcResult, evict_locked, plan_gc
from msft_store.maintenance.reader import CheckpointReader, open_reader
from msft_store.maintenance.repack import RepackPlan, plan_repack
from msft_store.maintenance.repair.plan import RepairPlan, plan_repair
from msft_store.maintenance.stats import (
    Stats,
    TensorSources,
    encoded_bytes,
    sources,
    stats,
)
from msft_store.objects.bases import Base, add_base, relocate
from msft_store.objects.catalog import (
    CONFIG,
    Catalog,
    Config,
    create_store,
    encode_config,
    read_consistently,
)
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    CheckpointFacts,
    TensorEntry,
    manifest_path,
)
from msft_store.objects.refs import REFS, Ref, check_ref_name, delete_ref, write_ref
from msft_store.pipeline.decode import (
    Source,
    decode_chunks,
    decode_state,
    device_of,
    empty_like,
)
from msft_store.pipeline.reshard import decode_boxes
from msft_store.pipeline.trail import Trail
from msft_store.pipeline.writer import CheckpointWriter
from msft_store.remote.api import remote_files, retry_after_gc
from msft_store.remote.publish import Publication
from msft_store.remote.transport.url import connect_remote
from msft_store.remote.versions import Version, check_version_name
from msft_store.retention import Policy
from msft_store.storage.backend import (
    Backend,
    LocalBackend,
    file_sizes,
    write_atomic,
)
from msft_store.storage.claims import Claim
from msft_store.storage.lock_files import Lock
from msft_store.storage.locks import YIELDING
from msft_store.storage.quota import QuotaBackend
from msft_store.tensors.averages import check_alike, normalise_weights
from msft_store.tensors.boxes import Box, Part, Parts, check_boxes, whole_box
from msft_store.tensors.bytes import (
    check_plain,
    check_tensors,
    flatten_entries,
    memory_key,
    torch_dtype,
)
from msft_store.tensors.files import check_files, file_tensors, split_files
from msft_store.tensors.matching import check_kinds, check_match, select_tensors
from msft_store.tensors.module_state import load_copies, split_entries
from msft_store.tensors.names import plain_names
from msft_store.tensors.nested import from_tensors, is_wrapper, json_name, names_in, parse_json
from msft_store.tensors.resident import Compared, check_compared

Target = torch.nn.Module | Mapping[str, torch.Tensor]


class _Session:
    """The state of one operation while it holds the lock."""

    def __init__(self, *, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.process = os.getpid()
        self.refs: dict[str, Ref] | None = None
        """The refs, or ``None`` until they are first read."""


class _Local(threading.local):
    session: _Session | None = None


class Store:
    """A content-addressed store of checkpoints in one directory.

    Methods that take a checkpoint accept the object, its id, a unique prefix of the id of at least
    4 characters, or the name of a ref. They raise :class:`UnknownCheckpointError` if there is no
    such checkpoint, and :class:`CorruptedError` if stored data is damaged.

    A store can be pickled, for example for spawned data loaders: the other process opens it anew.

    Args:
        backend: File system of the store's directory. Programs use :meth:`create` or :meth:`open`.

    Raises:
        NotAStoreError: The directory holds no store.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = QuotaBackend(backend)
        self._catalog = Catalog(self._backend)
        self._catalog.refresh()
        self._writer = CheckpointWriter(self._catalog, self._backend)
        self._local = _Local()
        self._published: dict[str, Claim] = {}
        """The claims of the names that this process publishes."""

    @classmethod
    def create(cls, path: PathLike, *, version: int = NEWEST) -> Store:
        """Create a store in a new or empty directory and open it.

        Args:
            path: Directory of the store.
            version: Version of the byte format. Version 1 is for older releases of this package;
                it takes more space.

        Raises:
            NotAStoreError: The directory holds a store or other files.
            InvalidInputError: There is no such version, or the directory is inside a
                store.
        """
        return cls(create_store(check_path(path), version))

    @classmethod
    def open(cls, path: PathLike) -> Store:
        """Open an existing store.

        Raises:
            NotAStoreError: The directory holds no store.
            VersionError: A newer release wrote the store.
        """
        return cls(LocalBackend(check_path(path)))

    @property
    def path(self) -> str:
        """Path of the store's directory."""
        return self._backend.describe("").rstrip("/")

    @property
    def version(self) -> int:
        """Version of the byte format in which the store is written."""
        return self._catalog.config.version

    def upgrade(self) -> None:
        """Let the store be written in the newest version of the byte format.

        Existing files stay as they are; every version is read. Releases of this package that do
        not know the newest version can no longer open the store.

        Raises:
            BusyError: Another process holds the lock for too long.
        """
        with self.session("upgrade", exclusive=True):
            config = Config()
            if self._catalog.config != config:
                write_atomic(self._backend, CONFIG, encode_config(config))
                self._catalog.config = config

    def __repr__(self) -> str:
        return f"Store({self.path!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[Backend]]:
        # Locks and caches belong to a process, so a process that gets a store opens it anew.
        return type(self), (self._backend.inner,)

    def add_base(self, path: PathLike) -> Base:
        """Record a model on disk as a base, by the keys of its chunks; copy nothing.

        Args:
            path: Safetensors file, or a directory of them.

        Returns:
            The base, for use as the ``parent`` of a save.

        Raises:
            BaseError: There are no valid safetensors files.
        """
        with self._backend.lock(shared=True, purpose="add-base"):
            base = add_base(self._backend, check_path(path))
        self._catalog.objects.add_base(base)
        return base

    def relocate(self, base: Base | str, path: PathLike) -> Base:
        """Record the new location of a base whose files were moved.

        Args:
            base: The base, its id, or a unique prefix of the id.
            path: New safetensors file or directory.

        Returns:
            The base with its new paths and the same id.

        Raises:
            BaseError: The files hold another model.
            UnknownCheckpointError: The store has no such base.
        """
        known = self.base(base)
        with self._backend.lock(shared=True, purpose="relocate"):
            moved = relocate(self._backend, known, check_path(path))
        self._catalog.objects.add_base(moved)
        return moved

    def bases(self) -> list[Base]:
        """Return all bases whose records can be read."""
        self._refresh()
        return list(self._catalog.objects.bases().values())

    def base(self, base: Base | str) -> Base:
        """Return a base by its id or a unique prefix of at least 4 characters.

        Raises:
            UnknownCheckpointError: The store has no such base.
        """
        found = self._catalog.resolve_base(base)
        if found is None:
            self._catalog.refresh()
            found = self._catalog.resolve_base(base)
        if found is None:
            ids = ", ".join(known.id[:12] for known in self._catalog.objects.bases().values())
            raise UnknownCheckpointError(
                f"no base {base!r} in {self.path}, which has {ids or 'none'}; give one's id or at "
                "least 4 characters that only it begins with, or add it with add-base"
            )
        return found

    def save(
        self,
        tensors: Mapping[str, torch.Tensor] | torch.nn.Module | Parts,
        *,
        parent: Base | Checkpoint | str | None = None,
        references: Iterable[Checkpoint | str] | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        compared: Compared | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Checkpoint:
        """Save tensors as a durable checkpoint; only chunks that the store lacks take space.

        Saving equal tensors with equal metadata again returns the existing checkpoint.

        Args:
            tensors: Tensors by name, a module, or the :class:`Parts` that several processes
                encoded.
            parent: Base or checkpoint that these tensors descend from.
            references: Checkpoints with similar tensors. The tensors are encoded against one of
                these, the parent or the base, whichever takes the fewest bytes for a sample of the
                chunks. By default the nearest ancestor that keeps chains of references short, or
                the base.
            step: Training step.
            metrics: Numbers by metric name, in their natural units.
            tags: Labels of the checkpoint.
            metadata: JSON object to keep with the checkpoint.
            compared: Result of :meth:`Resident.compare` for these tensors.
            files: The model's configuration and tokenizer, as
                :func:`~msft_store.integrations.model_files.model_files` returns them. An export
                writes them; they are no tensors of the checkpoint.

        Returns:
            The checkpoint.

        Raises:
            InvalidInputError: A checkpoint cannot hold one of the values.
            UnknownCheckpointError: The parent is not in this store.
            OverBudgetError: The save would exceed the limit of :meth:`within`.
            OutOfSpaceError: The disk is full.
            BusyError: Another process holds the lock for too long.
        """
        state = tensors if isinstance(tensors, Parts) else check_tensors(tensors)
        compared = check_compared(compared)
        facts = CheckpointFacts.of(step=step, metrics=metrics, tags=tags, metadata=metadata)
        kept = file_tensors(check_files(files))
        with self.session("save"):
            near = self._resolve(references)
            if not isinstance(state, Parts):
                state = {**state, **kept}
            elif kept:
                boxes = [whole_box(name, tensor) for name, tensor in kept.items()]
                part = self._writer.encode(boxes, parent=parent, references=near)
                state = Parts([*state, part])
            return self._writer.save(
                state, facts, parent=parent, references=near, compared=compared
            )

    def publish(
        self,
        model: Mapping[str, torch.Tensor] | torch.nn.Module | Parts | Checkpoint | str,
        *,
        name: str,
        step: int,
        to: Any,
        base: Base | PathLike | None = None,
        keep: Policy | None = None,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
        **options: Any,
    ) -> Version:
        """Save weights and send them to a place where a :class:`Follower` gets them.

        Each version is saved as a child of the version before, so only what changed is sent. The
        versions are pinned here and at the place, as ``versions/NAME/STEP`` and
        ``versions/NAME/latest``. One process at a time publishes a name.

        Args:
            model: What to save, as for :meth:`save`, or a checkpoint that is saved already.
            name: Name of the stream of versions, without ``/``.
            step: Training step. A step that is published again replaces its version.
            to: The place: a URL, a path, an obstore store or a remote, as for ``push``.
            base: Base of the first version, or the path of a model. Its files are sent once.
                Without it the first version goes whole. Later versions have the same base.
            keep: Retention policy for the versions of this name. The versions that it drops go from
                this store and, if the place is a directory, from there. The latest version stays,
                and so does a version that a follower leases. On an object store nothing is deleted.
            metrics: Numbers by metric name, as for :meth:`save`.
            files: The model's configuration and tokenizer, as for :meth:`save`.
            **options: Passed on to ``obstore.store.from_url`` or to the fsspec file system.

        Returns:
            The version, which is durable at the place.

        Raises:
            BusyError: Another process publishes this name from this store.
            ConflictError: Another store published this name there.
            InvalidInputError: The name or a value is not valid.
            BaseError: The base's files are missing or changed.
            StorageError: The place cannot be reached or refuses a request.
            StoreError: As for :meth:`save`.
        """
        check_version_name(name)
        saved = isinstance(model, Checkpoint | str)
        if saved and (metrics is not None or files is not None):
            raise InvalidInputError("a saved checkpoint has its metrics and files already")
        self._published[name] = self.claim("publish", name)
        with self.session("publish"):
            publication = Publication(self._catalog, connect_remote(to, **options), name)
            before = publication.find_before(self._refs())
            if isinstance(model, Checkpoint | str):
                checkpoint = self.get(model)
            else:
                parent: Base | Checkpoint | None = before
                if before is None and base is not None:
                    parent = base if isinstance(base, Base) else self.add_base(base)
                checkpoint = self.save(
                    model, parent=parent, step=step, metrics=metrics, files=files
                )
            version = Version(name=name, step=step, checkpoint=checkpoint.id)
            note: dict[str, Any] = {}
            retry_after_gc(
                lambda: note.update(publication.send(checkpoint, before, step)),
                publication.directory,
            )
            for ref in (version.ref, version.latest_ref):
                self.pin(checkpoint, ref, note=note)
                publication.send_ref(self._refs()[ref])
            publication.drop_changes(self._refs())
        if keep is not None:
            dropped = publication.drop(keep, self._catalog.refs())
            for ref in dropped:
                self.unpin(ref)
            self.evict(dropped.values())
        return version

    def average(
        self,
        checkpoints: Iterable[Checkpoint | str],
        weights: Sequence[float] | None = None,
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Save the weighted mean of checkpoints of one model, in bounded memory.

        Floats of 8 and 16 bits are summed in float32, those of 32 and 64 bits in float64, and the
        sum is rounded once. Elements that are equal in all checkpoints keep their bits. Integers,
        booleans, files and settings of an export are those of the last checkpoint, which is also
        the parent of the result. A checkpoint of weight 0 has no influence.

        Args:
            checkpoints: Checkpoints with tensors of the same names, shapes and dtypes.
            weights: A finite number for each checkpoint. They are divided by their sum, which must
                be positive. By default all are equal.
            step: Training step, as the others for :meth:`save`.
            metrics: Numbers by metric name.
            tags: Labels of the checkpoint.
            metadata: JSON object. Its ``"average"`` becomes the list of the checkpoints, each with
                its id as ``"checkpoint"`` and the ``"weight"`` after the division.

        Returns:
            The checkpoint of the mean.

        Raises:
            MismatchError: The checkpoints have other tensors, shapes or dtypes.
            InvalidInputError: There is no checkpoint, or the weights are not valid, or a checkpoint
                cannot hold one of the values.
            OverBudgetError: The save would exceed the limit of :meth:`within`.
            OutOfSpaceError: The disk is full.
            BusyError: Another process holds the lock for too long.
        """
        if isinstance(checkpoints, Checkpoint | str):
            raise InvalidInputError("average takes a list of checkpoints")
        given = list(checkpoints)
        shares = normalise_weights(weights, len(given))
        facts = CheckpointFacts.of(step=step, metrics=metrics, tags=tags, metadata=metadata)
        with self.session("average"):
            found = [self._catalog.resolve(one) for one in given]
            pairs = list(zip(found, shares, strict=True))
            sources = [{"checkpoint": one.id, "weight": share} for one, share in pairs]
            check_alike([(one, split_files(self._catalog.tensors(one))[0]) for one in found])
            used = [(one, share) for one, share in pairs if share]
            last = used[-1][0].metadata
            export = {EXPORT: last[EXPORT]} if EXPORT in last else {}
            facts = replace(facts, metadata={**export, **facts.metadata, "average": sources})
            return self._writer.average([c for c, _ in used], [share for _, share in used], facts)

    def encode(
        self,
        boxes: Iterable[Box],
        *,
        parent: Base | Checkpoint | str | None = None,
        references: Iterable[Checkpoint | str] | None = None,
    ) -> Part:
        """Write this process's share of a checkpoint that several processes save together.

        One process then collects all parts and calls ``save(Parts(parts))``. The next gc deletes
        parts that no checkpoint names, so that process keeps :meth:`awaiting_parts` open from
        before the first ``encode`` until its ``save`` returns.

        Args:
            boxes: Parts of tensors that this process holds.
            parent: Base or checkpoint that these tensors descend from; the same in all processes.
            references: As for :meth:`save`.

        Returns:
            The part, which can be pickled and sent to the process that saves.

        Raises:
            InvalidInputError: A box lies outside its tensor, or a tensor cannot be saved.
        """
        checked = check_boxes(boxes)
        plain = {name: new for new, name in plain_names({b.name: b.name for b in checked}).items()}
        checked = [replace(box, name=plain[box.name]) for box in checked]
        check_plain({box.name: box.tensor for box in checked})
        with self.session("encode"):
            return self._writer.encode(checked, parent=parent, references=self._resolve(references))

    def _resolve(self, names: Iterable[Checkpoint | str] | None) -> list[Checkpoint] | None:
        return None if names is None else [self._catalog.resolve(name) for name in names]

    def nearest(
        self, checkpoints: Sequence[Checkpoint], *, position: int | None = None
    ) -> Checkpoint | None:
        """Return the checkpoint of a history that the next one is best encoded against.

        Most checkpoints are encoded against one of the last few. The position in the history
        decides which of them it is, so that at most four references lead to the base.

        Args:
            checkpoints: Checkpoints of the history that are still there, oldest first.
            position: Number of checkpoints that the history had; by default as many as are there.

        Returns:
            One for ``references`` of :meth:`save`; ``None`` if the position asks for the base.
        """
        position = len(checkpoints) if position is None else position
        return self._writer.nearest(checkpoints[::-1], position=position)

    def load(
        self,
        checkpoint: Checkpoint | str,
        names: Iterable[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint, bit-exact and verified.

        Args:
            checkpoint: Checkpoint to load.
            names: Names of the tensors to load; all by default.
            device: Device of the returned tensors.

        Returns:
            New tensors by name.

        Raises:
            MismatchError: The checkpoint lacks one of the names.
            BaseError: The base's files are missing or changed.
        """
        found, tensors = self._entries(checkpoint)
        if names is not None:
            tensors = select_tensors(found, tensors, names)
        return self._read(found, tensors, tensors, device_of(device))

    def load_into(
        self,
        target: Target | Checkpoint | str | None = None,
        checkpoint: Target | Checkpoint | str | None = None,
        *,
        into: Target | None = None,
        partial: bool = False,
    ) -> None:
        """Restore a checkpoint in place into a module or into a mapping of tensors.

        The target and the checkpoint may be given in either order, and the target as ``into``, as
        in :meth:`Timeline.rollback`. An entry of a module's state dict that is not the memory of
        its parameters and buffers, such as extra state or packed weights, is restored by the
        module's ``load_state_dict``.

        Args:
            target: Module, or tensors by name, with the names, shapes and dtypes of the checkpoint.
                The tensors may be on any device and of any layout with memory for each element.
            checkpoint: Checkpoint to restore.
            into: Another name of ``target``.
            partial: True to ignore tensors of the checkpoint that the target does not have.

        Raises:
            InvalidInputError: There is not one target and one checkpoint.
            MismatchError: The target does not match the checkpoint. Nothing was changed, unless
                the message says otherwise: tensors that partly share memory, and values that a
                module's ``load_state_dict`` refuses, can only be found after others were written.
            BaseError: The base's files are missing or changed.
        """
        given = [one for one in (target, checkpoint, into) if one is not None]
        names = [one for one in given if isinstance(one, Checkpoint | str)]
        targets = [one for one in given if isinstance(one, torch.nn.Module | Mapping)]
        if not len(names) == len(targets) == 1:
            raise InvalidInputError(
                "load_into takes one checkpoint and one target, a module or a mapping of tensors"
            )
        self._load_into(targets[0], names[0], partial=partial)

    def sweep(
        self,
        target: Target,
        checkpoints: Iterable[Checkpoint | str],
        *,
        partial: bool = False,
    ) -> Iterator[Checkpoint]:
        """Load one checkpoint after the other into one target, by what differs between them.

        Each switch does what :meth:`load_into` does, and also verifies all chunks, the unchanged
        ones too. So the target may be changed in between. From one checkpoint to a similar one,
        only differences are read and decoded; the order of a history is the best. Meanwhile the
        ways back to earlier checkpoints are in memory; they mostly take a small part of the bytes
        of the target, and at most twice these.

        Args:
            target: Module, or tensors by name, as for :meth:`load_into`.
            checkpoints: Checkpoints to load, in this order.
            partial: As for :meth:`load_into`.

        Yields:
            Each checkpoint, when the target holds it.

        Raises:
            StoreError: As for :meth:`load_into`.
        """
        trail = Trail()
        for checkpoint in checkpoints:
            yield self._load_into(target, checkpoint, partial=partial, trail=trail)

    def _load_into(
        self,
        target: Target,
        checkpoint: Checkpoint | str,
        *,
        partial: bool,
        trail: Trail | None = None,
    ) -> Checkpoint:
        found, tensors = self._entries(checkpoint)
        tensors = plain_names(tensors)
        memory, copies = split_entries(target)
        own_names = plain_names({name: name for name in (*memory, *copies)})
        memory = {name: memory[own] for name, own in own_names.items() if own in memory}
        parts = {
            name: self._parts(found, tensors, name)
            for name, own in own_names.items()
            if own in copies
        }
        loaded = {part for some in parts.values() for part in some}
        state = flatten_entries(memory)
        wanted = {
            name: entry
            for name, entry in tensors.items()
            if name not in loaded and (name in state or not partial)
        }
        absent = {name: torch.empty(0) for name, some in parts.items() if not some}
        check_match(found, wanted, {**state, **absent})
        kinds = [json_name(name) for name, tensor in memory.items() if is_wrapper(tensor)]
        check_kinds(found, self._read(found, tensors, kinds), state)
        values = {}
        for name, some in parts.items():
            now = copies[own_names[name]]
            device = now.device if isinstance(now, torch.Tensor) else "cpu"
            read = self._read(found, tensors, some, device)
            values[own_names[name]] = (
                from_tensors(read, name) if json_name(name) in read else read[name]
            )
        # Restore tied tensors once: check_match has made sure that their contents are equal.
        once = {memory_key(tensor): name for name, tensor in state.items() if name not in kinds}
        self._decode(found, {name: tensors[name] for name in once.values()}, state, trail=trail)
        if isinstance(target, torch.nn.Module):
            load_copies(target, values)
        return found

    def _parts(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], name: str
    ) -> list[str]:
        """Return the names of the tensors that hold an entry of a state dict; empty if none do."""
        text = json_name(name)
        if text not in tensors:
            return [name] if name in tensors else []
        return [text, *names_in(parse_json(self._read(checkpoint, tensors, [text])[text]))]

    def _read(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorEntry],
        names: Iterable[str],
        device: str | torch.device = "cpu",
    ) -> dict[str, torch.Tensor]:
        wanted = {name: tensors[name] for name in names}
        state = {name: empty_like(entry, device) for name, entry in wanted.items()}
        self._decode(checkpoint, wanted, state, fresh=True)
        return state

    def load_boxes(self, checkpoint: Checkpoint | str, boxes: Iterable[Box]) -> None:
        """Restore parts of a checkpoint's tensors in place.

        Args:
            checkpoint: Checkpoint to restore. It may have been saved in other boxes.
            boxes: Boxes whose tensors are overwritten.

        Raises:
            MismatchError: A shape or dtype differs from the checkpoint. Nothing was changed.
        """
        found, tensors = self._entries(checkpoint)
        wanted = list(boxes)

        def decode() -> None:
            self._catalog.require_exists(found)
            decode_boxes(Source.of(self._catalog, found), tensors, wanted)

        read_consistently(self._backend, decode)

    def files(self, checkpoint: Checkpoint | str) -> dict[str, bytes]:
        """Return the files that were saved with a checkpoint, by their paths in an export."""
        found = self.get(checkpoint)
        return read_consistently(self._backend, lambda: read_files(self._catalog, found))

    def chunks(
        self, checkpoint: Checkpoint | str, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield the tensors of a checkpoint in small verified parts, to bound memory.

        Checkpoints of equal shapes and dtypes have parts at equal places. The exception is a tensor
        that was saved in several boxes: it is yielded as one part of its full size.

        Args:
            checkpoint: Checkpoint to read.
            names: Names of the tensors to read, in this order; by default all, sorted by name.

        Yields:
            The tensor's name, the row-major index of the part's first element, and the part as a
            flat CPU tensor of at most 4 MiB. Empty tensors have no part.

        Raises:
            MismatchError: The checkpoint lacks one of the names.
        """
        found, tensors = self._entries(checkpoint)
        if names is not None:
            tensors = select_tensors(found, tensors, names)
        with contextlib.closing(decode_chunks(Source.of(self._catalog, found), tensors)) as parts:
            for name, start, data in parts:
                yield name, start, torch.from_numpy(data).view(torch_dtype(tensors[name].dtype))

    def open_checkpoint(
        self,
        checkpoint: Checkpoint | str,
        *,
        layout: Literal["files", "memory"] = "memory",
        device: str | torch.device = "cpu",
    ) -> CheckpointReader:
        """Return a reader with the methods of ``safetensors.safe_open``; read no tensor yet.

        Args:
            checkpoint: Checkpoint to read.
            layout: ``"memory"`` gives the tensors as :meth:`load` does, ``"files"`` those that
                :meth:`export` writes, with their names and shapes there.
            device: Device of the tensors.
        """
        found, place = self.get(checkpoint), device_of(device)
        if layout not in ("files", "memory"):
            raise InvalidInputError(f'a layout is "files" or "memory", not {layout!r}')
        return read_consistently(
            self._backend,
            lambda: open_reader(self._catalog, found, layout=layout, device=place),
        )

    def get(self, checkpoint: Checkpoint | str) -> Checkpoint:
        """Return a checkpoint by id, unique prefix of an id, or name of a ref.

        Raises:
            UnknownCheckpointError: Nothing has this name; the message suggests the closest one.
        """
        try:
            return self._catalog.resolve(checkpoint)
        except (UnknownCheckpointError, CorruptedError):
            # Another process may have saved or pinned it since the last refresh.
            self._catalog.refresh()
            return self._catalog.resolve(checkpoint)

    def depth(self, checkpoint: Checkpoint | str) -> int:
        """Count the references between a checkpoint and plain bytes.

        The result is the depth that at least half of its encoded bytes do not exceed.
        """
        return self._catalog.depth(self.get(checkpoint))

    def log(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first."""
        self._refresh()
        return self._catalog.checkpoints()

    def tensors(self, checkpoint: Checkpoint | str) -> dict[str, TensorEntry]:
        """Return the dtype, shape and chunk keys of a checkpoint's tensors by name."""
        return self._entries(checkpoint)[1]

    def sources(self, checkpoint: Checkpoint | str) -> list[TensorSources]:
        """Return for each tensor of a checkpoint how its chunks are kept, and its bytes."""
        return list(sources(self._catalog, self.get(checkpoint)))

    def pin(
        self, checkpoint: Checkpoint | str, name: str, *, note: Mapping[str, Any] | None = None
    ) -> None:
        """Protect a checkpoint from eviction by pointing a ref to it.

        Args:
            checkpoint: Checkpoint to protect.
            name: Name of the ref. An existing ref of this name moves to the checkpoint.
            note: JSON object to keep with the ref.

        Raises:
            InvalidInputError: The name or the note is not valid, or the name is new and the id of
                another checkpoint, or of a base, begins with it.
        """
        check_ref_name(name)
        with self.session("pin"):
            found = self._catalog.resolve(checkpoint)
            if name not in self._refs():
                self._catalog.check_not_an_id(name, found.id)
            # Another process may have written the manifest and crashed before its fsync.
            self._backend.sync(MANIFESTS)
            ref = Ref(name=name, checkpoint=found.id, note=note or {})
            write_ref(self._backend, ref)
            self._refs()[name] = ref

    @contextlib.contextmanager
    def session(self, purpose: str, *, exclusive: bool = False) -> Iterator[None]:
        """Run several operations of this thread under one lock and on one view of the store.

        The outermost session takes the lock and reads the catalog once; refs are read once and
        then held in memory. Nested sessions, and all methods of this store called inside, use
        these. Files that other processes write meanwhile become visible after it ends.

        Args:
            purpose: Name of the operation, as listings of locks and errors show it.
            exclusive: True to exclude all other writers, as deleting requires; False to share the
                lock with other writers that do not delete.

        Raises:
            BusyError: Others hold the lock for too long, or this thread holds it as shared and
                asks for it exclusively.
        """
        outer = self._session
        if outer is not None and (outer.exclusive or not exclusive):
            yield
            return
        with self._backend.lock(shared=not exclusive, purpose=purpose):
            self._catalog.refresh()
            self._local.session = _Session(exclusive=exclusive)
            try:
                yield
            finally:
                self._local.session = outer

    @property
    def _session(self) -> _Session | None:
        # A forked process inherits the thread's session, but not its lock.
        session = self._local.session
        return session if session is not None and session.process == os.getpid() else None

    def _refs(self) -> dict[str, Ref]:
        session = self._session
        if session is None:
            return self._catalog.refs()
        if session.refs is None:
            session.refs = self._catalog.refs()
        return session.refs

    def _refresh(self) -> None:
        if self._session is None:
            self._catalog.refresh()

    def protecting(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Block every gc and ``forget`` of any process while the context is open.

        ``purpose`` names the operation in listings of locks.
        """
        return self._backend.lock(shared=True, purpose=purpose)

    def claim(self, kind: str, name: str) -> Claim:
        """Reserve a name for this process until the claim is released or the process ends.

        Timelines use claims so that no two processes write to one timeline. A second claim of the
        same name in one process returns the first one. A read-only store grants every claim.

        Args:
            kind: Kind of the named thing, such as ``"timeline"``.
            name: Name to reserve.

        Raises:
            BusyError: Another process holds the claim; the message names it.
        """
        return self._backend.claim(kind, name)

    def awaiting_parts(self) -> contextlib.AbstractContextManager[None]:
        """Block every gc while several processes encode the parts of one checkpoint.

        Use it in the process that saves. If the same thread asks for the exclusive lock meanwhile,
        the save must have failed in another process, and the block ends early.
        """
        return self._backend.lock(shared=True, purpose=YIELDING)

    def within(
        self, max_bytes: int | None, *, reserve: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """Limit the size of the store's directory for this thread's writes, within the context.

        A write that would exceed the limit raises :class:`OverBudgetError` before it begins.
        Temporary files count; the files of bases do not.

        Args:
            max_bytes: Limit in bytes, or ``None`` for no limit.
            reserve: Bytes of the limit that writes must leave free.
        """
        return self._backend.limit(max_bytes, reserve=reserve)

    def locks(self) -> list[Lock]:
        """Return the locks of all processes that write, and of some that wait; oldest first."""
        return list(self._backend.locks())

    def unlock(self, *, force: bool = False) -> list[Lock]:
        """Remove the locks of dead processes, and return them.

        Waiting operations take over the locks of dead processes by themselves, so this is needed
        only if the owner of a lock hangs.

        Args:
            force: True to remove the locks of living processes too. Such a process then fails
                before it changes anything.
        """
        return list(self._backend.unlock(force=force))

    def unpin(self, name: str) -> None:
        """Delete a ref; the checkpoint stays until it is forgotten.

        Raises:
            UnknownCheckpointError: There is no such ref.
        """
        refs = self._refs()
        if name not in refs:
            raise UnknownCheckpointError(f"no ref {name!r} in {self.path}")
        delete_ref(self._backend, name)
        del refs[name]

    def refs(self) -> dict[str, str]:
        """Return the checkpoint ids of all refs by name."""
        return {name: ref.checkpoint for name, ref in self._refs().items()}

    def notes(self) -> dict[str, Mapping[str, Any]]:
        """Return the notes of all refs, JSON objects, by name."""
        return {name: ref.note for name, ref in self._refs().items()}

    def forget(self, checkpoint: Checkpoint | str) -> None:
        """Delete the manifest of a checkpoint; the next gc frees its space.

        Raises:
            PinnedError: A ref points to the checkpoint.
            BusyError: Another process holds the lock for too long.
        """
        with self.session("forget", exclusive=True):
            found = self._catalog.resolve(checkpoint)
            reason = self._catalog.list_protected().get(found.id)
            if reason is not None:
                raise PinnedError(f"checkpoint {found.id[:12]} is {reason}; unpin it first")
            self._catalog.delete_leases_of({found.id})
            self._backend.sync(REFS)
            self._backend.delete(manifest_path(found.id))
            self._catalog.remove(found.id)

    def anchor(self, checkpoint: Checkpoint | str) -> Checkpoint:
        """Re-encode a checkpoint so that restoring it needs nothing but the base.

        Other checkpoints can then be stored as differences from it. The next gc may free the chunks
        that it needed before. The result has the same id and the new ``stored_bytes``.
        """
        with self.session("anchor"):
            return self._writer.anchor(self._catalog.resolve(checkpoint))

    def rebase(self, checkpoint: Checkpoint | str, onto: Checkpoint | str) -> Checkpoint:
        """Re-encode a checkpoint as a difference from another one, if that frees space.

        Use it for a checkpoint that stays when the checkpoint that it is a difference from is
        forgotten. Nothing happens unless gc can then free more bytes than re-encoding takes. The
        result has the same id and the new ``stored_bytes``.

        Raises:
            InvalidInputError: The two checkpoints have different bases.
        """
        with self.session("rebase"):
            found, other = self._catalog.resolve(checkpoint), self._catalog.resolve(onto)
            return self._writer.rebase([found], other)[0]

    def reencode(self, root: Checkpoint | str, others: Iterable[Checkpoint | str]) -> None:
        """Re-encode ``root`` against its base alone, then each other checkpoint against ``root``.

        This is :meth:`anchor` and :meth:`rebase` in one session. Checkpoints of another base than
        ``root`` are not changed.
        """
        with self.session("reencode"):
            anchored = self._writer.anchor(self._catalog.resolve(root))
            found = [self._catalog.resolve(other) for other in others]
            self._writer.rebase([c for c in found if c.base == anchored.base], anchored)

    def plan_gc(self, policy: Policy | None = None) -> GcPlan:
        """Plan how to free space; delete nothing.

        Args:
            policy: Retention policy. Checkpoints that it drops and no ref protects are forgotten.
                Without a policy, only bytes that no checkpoint needs are freed.

        Returns:
            A plan to ``print`` and then ``execute()``.

        Raises:
            OverBudgetError: The checkpoints that must be kept exceed the policy's budget.
        """
        return read_consistently(self._backend, lambda: plan_gc(self._catalog, policy))

    def plan_repack(self) -> RepackPlan:
        """Plan how to merge packs into fewer ones without dead bytes; change nothing."""
        return read_consistently(self._backend, lambda: plan_repack(self._catalog))

    def evict(self, checkpoints: Iterable[str]) -> GcResult:
        """Forget checkpoints by id and free their space at once; those with a ref are kept.

        Raises:
            BusyError: Another process holds the lock for too long.
        """
        with self.session("gc", exclusive=True):
            return evict_locked(self._catalog, list(checkpoints))

    def release(self, checkpoints: Iterable[Checkpoint | str]) -> GcResult:
        """Free bytes of forgotten checkpoints that others are differences of.

        Those others are encoded again, against the base or the nearest of the given checkpoints, if
        that takes fewer bytes than it frees. No id changes.

        Args:
            checkpoints: Checkpoints of one history that stay.

        Raises:
            OverBudgetError: The new encodings exceed the limit of :meth:`within`.
            OutOfSpaceError: The disk is full.
            BusyError: Another process holds the lock for too long.
        """
        with self.session("release", exclusive=True):
            found = [self._catalog.resolve(checkpoint) for checkpoint in checkpoints]
            results = [evict_locked(self._catalog, [])]
            # What one of them leaves behind makes room for the next.
            for _ in self._writer.release(found):
                results.append(evict_locked(self._catalog, []))
        return replace(
            results[-1],
            freed_bytes=sum(result.freed_bytes for result in results),
            peak_bytes=max(result.peak_bytes for result in results),
        )

    def check(self, read_data: bool = True) -> list[Finding]:
        """Return the problems of the store; see :meth:`examine`."""
        return list(self.examine(read_data).findings)

    def examine(self, read_data: bool = True) -> Report:
        """Check the store for damage and list the intact checkpoints.

        Args:
            read_data: True to decode and verify every chunk; False to check only that all files
                and references exist.
        """
        # A new catalog has no cached files, so that damage since the last read is found.
        return read_consistently(
            self._backend,
            lambda: examine(Catalog(self._backend), read_data=read_data),
            lambda report: not report.findings,
        )

    def plan_repair(self) -> RepairPlan:
        """Read the whole store and plan how to repair damage; change nothing.

        A store whose ``store.json`` is damaged cannot be opened; run ``msft-store repair`` for it.
        """
        return plan_repair(self._backend)

    def diff(
        self, one: Base | Checkpoint | str, other: Base | Checkpoint | str
    ) -> list[TensorDiff]:
        """Compare two checkpoints or bases bit by bit.

        Returns:
            One entry for each tensor of either side, equal ones included, by name.
        """
        first, second = self._either(one), self._either(other)
        return read_consistently(self._backend, lambda: diff(self._catalog, first, second))

    def export(
        self,
        checkpoint: Checkpoint | str,
        folder: PathLike,
        *,
        like: PathLike | None = None,
        layout: Literal["files", "memory"] | None = None,
    ) -> list[Path]:
        """Write a checkpoint as an ordinary directory of safetensors files; return their paths.

        Args:
            checkpoint: Checkpoint to export.
            folder: New directory.
            like: Model directory to copy configuration and tokenizer from. By default they are
                those that were saved with the checkpoint, and what they lack is the base's.
            layout: ``"files"`` gives the tensors the names and shapes that they have in the files
                of the base, ``"memory"`` those that they were saved with. The default is that of
                the files for all tensors for which the checkpoint records it.

        Raises:
            InvalidInputError: The directory is not empty, or inside the store, or ``layout`` is
                ``"files"`` and some tensors have no form in the files of the base.
        """
        found, place = self.get(checkpoint), check_path(folder)
        beside = None if like is None else check_path(like)
        return read_consistently(
            self._backend,
            lambda: export(self._catalog, found, place, like=beside, layout=layout),
        )

    def encoded_bytes(self, checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
        """Count the encoded bytes of the chunks that checkpoints name now, by id.

        The count can differ from ``Checkpoint.stored_bytes``, because chunks can be re-encoded
        after a save. Forgotten checkpoints are left out.
        """
        found = list(checkpoints)
        return read_consistently(self._backend, lambda: encoded_bytes(self._catalog, found))

    def held_bytes(self) -> int:
        """Count the encoded bytes of forgotten checkpoints that others are differences from."""
        return self.stats().held_bytes

    def manifest_bytes(self, checkpoint: Checkpoint | str | None = None) -> int:
        """Count the bytes of a checkpoint's manifest, or of all, which ``stored_bytes`` lacks."""
        if checkpoint is not None:
            return self._backend.size(manifest_path(self.get(checkpoint).id))
        return sum(file_sizes(self._backend, MANIFESTS).values())

    def stats(self) -> Stats:
        """Count the checkpoints and chunks of the store, and their sizes in bytes."""
        return read_consistently(self._backend, lambda: stats(self._catalog))

    def _either(self, name: Base | Checkpoint | str) -> Base | Checkpoint:
        if isinstance(name, Base):
            return self.base(name)
        try:
            return self.get(name)
        except UnknownCheckpointError:
            base = self._catalog.resolve_base(name) if isinstance(name, str) else None
            if base is None:
                raise
            return base

    def _entries(self, checkpoint: Checkpoint | str) -> tuple[Checkpoint, dict[str, TensorEntry]]:
        found = self.get(checkpoint)
        return found, split_files(self._catalog.tensors(found))[0]

    def _decode(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorEntry],
        outs: Mapping[str, torch.Tensor],
        *,
        fresh: bool = False,
        trail: Trail | None = None,
    ) -> None:
        def decode() -> None:
            self._catalog.require_exists(checkpoint)
            source = Source.of(self._catalog, checkpoint)
            decode_state(source, tensors, outs, fresh=fresh, trail=trail)

        read_consistently(self._backend, decode)


def open_remote(url: Any, *, bases: Iterable[PathLike] = (), **options: Any) -> Store:
    """Open a remote store for reading: ``log``, ``load``, ``chunks``, ``export``, ``check``.

    Its writing methods raise :class:`StorageError`.

    Args:
        url: A URL, a path, an obstore store or a :class:`~msft_store.remote.transport.base.Remote`.
        bases: Paths of models on this machine that are bases of the store. They are read once, and
            only the returned store knows their places.
        **options: Passed on to ``obstore.store.from_url`` or to the fsspec file system.

    Raises:
        NotAStoreError: If there is no store at the URL.
        BaseError: If a model is not one of the store's bases.
        StorageError: If the remote cannot be reached.
    """
    return Store(remote_files(url, bases=bases, **options))
