"""The store: what a program calls.

Invariants: ``save`` never deletes; a checkpoint exists once ``save`` returns, durably, and not
before; whatever ``load`` returns is bit-exact, because every chunk is compared with its key.

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
from pathlib import Path
from typing import Any

import torch

from msft_store._util import PathLike, check_path
from msft_store.codec.codecs import Level
from msft_store.errors import (
    CorruptedError,
    NotAStoreError,
    PinnedError,
    UnknownCheckpointError,
)
from msft_store.maintenance.check import Finding, Report, examine
from msft_store.maintenance.diff import TensorDiff, diff
from msft_store.maintenance.export import export
from msft_store.maintenance.gc import GcPlan, GcResult, evict_locked, plan_gc
from msft_store.maintenance.repack import RepackPlan, plan_repack
from msft_store.maintenance.repair.plan import RepairPlan, plan_repair
from msft_store.maintenance.stats import (
    Stats,
    TensorSources,
    encoded_bytes,
    held_bytes,
    sources,
    stats,
)
from msft_store.objects.bases import Base, add_base, relocate
from msft_store.objects.catalog import CONFIG, Catalog, check_level, read_consistently, write_config
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    CheckpointFacts,
    TensorEntry,
    manifest_path,
)
from msft_store.objects.refs import REFS, Ref, check_ref_name, delete_ref, write_ref
from msft_store.pipeline.decode import decode_chunks, decode_state, device_of, empty_like
from msft_store.pipeline.reshard import decode_boxes
from msft_store.pipeline.writer import CheckpointWriter
from msft_store.retention import Policy
from msft_store.storage.backend import (
    TEMPORARY,
    Backend,
    LocalBackend,
    translate_os_errors,
    write_atomic,
)
from msft_store.storage.claims import Claim
from msft_store.storage.lock_files import Lock
from msft_store.storage.locks import YIELDING
from msft_store.storage.quota import QuotaBackend
from msft_store.tensors.boxes import Box, Part, Parts, check_boxes
from msft_store.tensors.bytes import check_tensors, memory_key, torch_dtype
from msft_store.tensors.matching import check_match, select_tensors
from msft_store.tensors.resident import Compared, check_compared


class _Session:
    """The view of one operation while it holds the lock."""

    def __init__(self, *, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.process = os.getpid()
        self.refs: dict[str, Ref] | None = None
        """The refs, once they were read."""


class _Local(threading.local):
    session: _Session | None = None


class Store:
    """A content-addressed store of checkpoints in one directory."""

    def __init__(self, backend: Backend) -> None:
        self._backend = QuotaBackend(backend)
        self._catalog = Catalog(self._backend)
        self._catalog.refresh()
        self._writer = CheckpointWriter(self._catalog, self._backend)
        self._local = _Local()

    @classmethod
    def create(cls, path: PathLike, *, level: Level = "fast") -> Store:
        """Create a store in a new or empty directory and open it.

        ``level`` is what its saves aim for unless they say otherwise: ``fast`` or ``small``.
        :class:`NotAStoreError` if there is a store already, or something else.
        """
        config = write_config(level)
        root = check_path(path)
        backend = LocalBackend(root)
        if backend.exists(CONFIG):
            raise NotAStoreError(
                f"there is a store at {root} already: open that one, or choose another path"
            )
        with translate_os_errors("read", root):
            # One that was killed here, or had no room, may have left its temporary file.
            if root.exists() and (
                not root.is_dir() or {p.name for p in root.iterdir()} - {TEMPORARY}
            ):
                raise NotAStoreError(f"{root} is not empty and not a store; choose a new directory")
        backend.make_root()
        write_atomic(backend, CONFIG, config)
        return cls(backend)

    @classmethod
    def open(cls, path: PathLike) -> Store:
        """Open a store; :class:`NotAStoreError` if there is none."""
        return cls(LocalBackend(check_path(path)))

    @property
    def path(self) -> str:
        """Where the store is."""
        return self._backend.describe("").rstrip("/")

    @property
    def level(self) -> Level:
        """What a save aims for unless it says otherwise."""
        return self._catalog.level

    def __repr__(self) -> str:
        return f"Store({self.path!r})"

    def add_base(self, path: PathLike) -> Base:
        """Record a safetensors file, or a directory of them, by content; nothing is copied."""
        with self._backend.lock(shared=True, purpose="add-base"):
            base = add_base(self._backend, check_path(path))
        self._catalog.objects.add_base(base)
        return base

    def relocate(self, base: Base | str, path: PathLike) -> Base:
        """Tell where a base's files are now; :class:`BaseError` if they hold another model."""
        known = self.base(base)
        with self._backend.lock(shared=True, purpose="relocate"):
            moved = relocate(self._backend, known, check_path(path))
        self._catalog.objects.add_base(moved)
        return moved

    def bases(self) -> list[Base]:
        """Return all bases."""
        self._refresh()
        return list(self._catalog.objects.bases().values())

    def base(self, base: Base | str) -> Base:
        """Return a base by id or unique prefix."""
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
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        level: Level | None = None,
        compared: Compared | None = None,
    ) -> Checkpoint:
        """Store tensors as a checkpoint, durably; only what the store has not yet costs space.

        ``parent`` is the lineage: a base, a checkpoint, or ``None``. ``level`` is what encoding
        aims for, ``fast`` or ``small``; by default the store's. ``compared`` is what a
        :class:`Resident` found on the device. Saving equal content with equal metadata again
        returns the checkpoint that is there. Of :class:`Parts`, all is encoded already.
        """
        state = tensors if isinstance(tensors, Parts) else check_tensors(tensors)
        level = self.level if level is None else check_level(level)
        compared = check_compared(compared)
        facts = CheckpointFacts.of(step=step, metrics=metrics, tags=tags, metadata=metadata)
        with self.session("save"):
            return self._writer.save(state, facts, parent=parent, level=level, compared=compared)

    def encode(
        self,
        boxes: Iterable[Box],
        *,
        parent: Base | Checkpoint | str | None = None,
        level: Level | None = None,
    ) -> Part:
        """Write what this process holds of a checkpoint to come; ``save`` of all parts makes one.

        Parts that no checkpoint is made of go with the next gc. The process that saves holds it off
        meanwhile: ``with store.awaiting_parts()`` around all of it.
        """
        mine = check_boxes(boxes)
        check_tensors({box.name: box.tensor for box in mine})
        level = self.level if level is None else check_level(level)
        with self.session("encode"):
            return self._writer.encode(mine, parent=parent, level=level)

    def load(
        self,
        checkpoint: Checkpoint | str,
        names: Iterable[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> dict[str, torch.Tensor]:
        """Return a checkpoint's tensors, all or those named, bit-exact and verified."""
        found, tensors = self._entries(checkpoint)
        if names is not None:
            tensors = select_tensors(found, tensors, names)
        place = device_of(device)
        state = {name: empty_like(entry, place) for name, entry in tensors.items()}
        self._decode(found, tensors, state)
        return state

    def load_into(
        self,
        target: torch.nn.Module | Mapping[str, torch.Tensor],
        checkpoint: Checkpoint | str,
    ) -> None:
        """Restore a checkpoint into a module's tensors, or those of a mapping, in place.

        Names, shapes and dtypes must be equal; tensors may be on any device and of any layout with
        memory for each element. :class:`MismatchError` names what differs, and then nothing was
        changed, unless it says so: where tensors share memory for what is not equal.
        """
        found, tensors = self._entries(checkpoint)
        items = target.state_dict() if isinstance(target, torch.nn.Module) else target
        state = {name: tensor for name, tensor in items.items() if torch.is_tensor(tensor)}
        check_match(found, tensors, state)
        # Tied tensors are restored once: they are equal, or they would not match.
        once = {memory_key(tensor): name for name, tensor in state.items()}
        self._decode(found, {name: tensors[name] for name in once.values()}, state)

    def load_boxes(self, checkpoint: Checkpoint | str, boxes: Iterable[Box]) -> None:
        """Fill the tensors of boxes, in place, with what a checkpoint has there.

        It may have been saved in any other pieces. :class:`MismatchError` names what differs in
        shape or dtype; then nothing was changed.
        """
        found, tensors = self._entries(checkpoint)
        wanted, what = list(boxes), f"checkpoint {found.id[:12]}"

        def decode() -> None:
            self._catalog.require_exists(found)
            decode_boxes(self._catalog.objects, tensors, wanted, base=found.base, what=what)

        read_consistently(self._backend, decode)

    def chunks(
        self, checkpoint: Checkpoint | str, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield a checkpoint's tensors in parts: name, first element (row by row), flat CPU tensor.

        Verified, at most 4 MiB each, in the order of ``names`` or sorted by name; a few parts are
        in memory at a time. Checkpoints of equal shapes and dtypes come apart alike, unless they
        were saved in pieces: such a tensor comes whole. An empty one has no part.
        """
        found, tensors = self._entries(checkpoint)
        if names is not None:
            tensors = select_tensors(found, tensors, names)
        what = f"checkpoint {found.id[:12]}"
        parts = decode_chunks(self._catalog.objects, tensors, base=found.base, what=what)
        with contextlib.closing(parts):
            for name, start, data in parts:
                yield name, start, torch.from_numpy(data).view(torch_dtype(tensors[name].dtype))

    def get(self, checkpoint: Checkpoint | str) -> Checkpoint:
        """Return a checkpoint by id, unique prefix of an id, or name of a ref."""
        try:
            return self._catalog.resolve(checkpoint)
        except (UnknownCheckpointError, CorruptedError):
            # What others saved or pinned since.
            self._catalog.refresh()
            return self._catalog.resolve(checkpoint)

    def log(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first."""
        self._refresh()
        return self._catalog.checkpoints()

    def tensors(self, checkpoint: Checkpoint | str) -> dict[str, TensorEntry]:
        """Return names, dtypes, shapes and chunk keys of a checkpoint's tensors."""
        return self._entries(checkpoint)[1]

    def sources(self, checkpoint: Checkpoint | str) -> list[TensorSources]:
        """Return a checkpoint's tensors and where their bytes come from."""
        return list(sources(self._catalog, self.get(checkpoint)))

    def pin(
        self, checkpoint: Checkpoint | str, name: str, *, note: Mapping[str, Any] | None = None
    ) -> None:
        """Point a ref to a checkpoint, which is not evicted while it does; an old ref moves."""
        check_ref_name(name)
        with self.session("pin"):
            found = self._catalog.resolve(checkpoint)
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
        these. Files that other processes write meanwhile are seen by the next session.

        Args:
            purpose: Name of the operation, as ``msft-store inspect --locks`` and errors show it.
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
        """Hold off every gc and ``forget``, from here or elsewhere, while in this context."""
        return self._backend.lock(shared=True, purpose=purpose)

    def claim(self, kind: str, name: str) -> Claim:
        """Have what is named used by this process alone, until it ends or ends the claim.

        A timeline does so; :class:`BusyError` names another process that has it. A second claim in
        one process is the same one. A store that cannot be written has no claims.
        """
        return self._backend.claim(kind, name)

    def awaiting_parts(self) -> contextlib.AbstractContextManager[None]:
        """Hold off every gc until what several processes encode is saved, in the one that saves.

        It ends with the context, or when the same thread wants the store alone: then the save has
        failed in another process.
        """
        return self._backend.lock(shared=True, purpose=YIELDING)

    def within(
        self, max_bytes: int | None, *, reserve: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """Let no write of this thread in this context take the directory beyond ``max_bytes``.

        Temporary files count, bases are elsewhere. :class:`OverBudgetError` comes before a write
        that would leave less than ``reserve`` bytes of it.
        """
        return self._backend.limit(max_bytes, reserve=reserve)

    def locks(self) -> list[Lock]:
        """Return who writes to the store, and some who wait to, here or elsewhere; oldest first."""
        return list(self._backend.locks())

    def unlock(self, *, force: bool = False) -> list[Lock]:
        """Remove locks whose owners are or count as dead, with ``force`` all; return them.

        Nothing that waits for the lock needs this, unless an owner hangs. One that lives on in
        spite of ``force`` fails before it changes anything.
        """
        return list(self._backend.unlock(force=force))

    def unpin(self, name: str) -> None:
        """Remove a ref."""
        refs = self._refs()
        if name not in refs:
            raise UnknownCheckpointError(f"no ref {name!r} in {self.path}")
        delete_ref(self._backend, name)
        del refs[name]

    def refs(self) -> dict[str, str]:
        """Return the checkpoint id that each ref points to."""
        return {name: ref.checkpoint for name, ref in self._refs().items()}

    def notes(self) -> dict[str, Mapping[str, Any]]:
        """Return what each ref carries besides its checkpoint."""
        return {name: ref.note for name, ref in self._refs().items()}

    def forget(self, checkpoint: Checkpoint | str) -> None:
        """Make a checkpoint one no more; gc frees its space.

        :class:`PinnedError` if a ref is on it.
        """
        with self.session("forget", exclusive=True):
            found = self._catalog.resolve(checkpoint)
            reason = self._catalog.list_protected().get(found.id)
            if reason is not None:
                raise PinnedError(f"checkpoint {found.id[:12]} is {reason}; unpin it first")
            self._backend.sync(REFS)
            self._backend.delete(manifest_path(found.id))
            self._catalog.remove(found.id)

    def anchor(self, checkpoint: Checkpoint | str) -> Checkpoint:
        """Re-encode a checkpoint so that restoring it needs nothing but the base.

        Others may then be differences of it. Its id stays; what it needed before, gc may free.
        """
        with self.session("anchor"):
            return self._writer.anchor(self._catalog.resolve(checkpoint))

    def rebase(self, checkpoint: Checkpoint | str, onto: Checkpoint | str) -> Checkpoint:
        """Re-encode a checkpoint as a change of another one, if gc can free more than that takes.

        For one that stays while what it was a change of goes. Its id stays.
        :class:`InvalidInputError` if the two have different bases.
        """
        with self.session("rebase"):
            found, other = self._catalog.resolve(checkpoint), self._catalog.resolve(onto)
            return self._writer.rebase([found], other)[0]

    def reencode(self, root: Checkpoint | str, others: Iterable[Checkpoint | str]) -> None:
        """Re-encode ``root`` against its base alone, then each other checkpoint against ``root``.

        This is :meth:`anchor` and :meth:`rebase` in one session. Checkpoints of another base stay
        as they are.
        """
        with self.session("reencode"):
            anchored = self._writer.anchor(self._catalog.resolve(root))
            found = [self._catalog.resolve(other) for other in others]
            self._writer.rebase([c for c in found if c.base == anchored.base], anchored)

    def plan_gc(self, policy: Policy | None = None) -> GcPlan:
        """Return what could be freed; ``print`` it, then ``execute`` it.

        Without a policy, only bytes that no checkpoint needs; with one, also the checkpoints that
        it does not keep and no ref protects.
        """
        return read_consistently(self._backend, lambda: plan_gc(self._catalog, policy))

    def plan_repack(self) -> RepackPlan:
        """Return how few packs would do, without anything dead; ``print`` it, ``execute`` it."""
        return read_consistently(self._backend, lambda: plan_repack(self._catalog))

    def evict(self, checkpoints: Iterable[str]) -> GcResult:
        """Forget checkpoints by id, but those that a ref protects, and free their space at once."""
        with self.session("gc", exclusive=True):
            return evict_locked(self._catalog, list(checkpoints))

    def check(self, read_data: bool = True) -> list[Finding]:
        """Return what is wrong with the store, an empty list if nothing is."""
        return list(self.examine(read_data).findings)

    def examine(self, read_data: bool = True) -> Report:
        """Return what is wrong with the store, and which checkpoints are sound all the same."""
        # A catalog of its own, for what was read earlier may be damaged since.
        return read_consistently(
            self._backend,
            lambda: examine(Catalog(self._backend), read_data=read_data),
            lambda report: not report.findings,
        )

    def plan_repair(self) -> RepairPlan:
        """Return what is damaged and what of it can be kept; ``print`` it, then ``execute`` it.

        Everything is read. Where ``store.json`` itself is damaged: ``msft-store repair``.
        """
        return plan_repair(self._backend)

    def diff(
        self, one: Base | Checkpoint | str, other: Base | Checkpoint | str
    ) -> list[TensorDiff]:
        """Return what differs between two checkpoints or bases, tensor by tensor, by bits."""
        first, second = self._either(one), self._either(other)
        return read_consistently(self._backend, lambda: diff(self._catalog, first, second))

    def export(
        self, checkpoint: Checkpoint | str, folder: PathLike, *, like: PathLike | None = None
    ) -> list[Path]:
        """Write a checkpoint as an ordinary directory of safetensors; return its files.

        Configuration and tokenizer come from the base's directory, or from the one that ``like``
        names.
        """
        found, place = self.get(checkpoint), check_path(folder)
        beside = None if like is None else check_path(like)
        return read_consistently(
            self._backend, lambda: export(self._catalog, found, place, like=beside)
        )

    def encoded_bytes(self, checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
        """Return the encoded bytes of the chunks that checkpoints name, as of now, by id.

        Others may have stored a chunk anew since a checkpoint was saved. What was forgotten is not
        in there.
        """
        found = list(checkpoints)
        return read_consistently(self._backend, lambda: encoded_bytes(self._catalog, found))

    def held_bytes(self) -> int:
        """Return the encoded bytes of forgotten checkpoints that others are differences of."""
        return read_consistently(self._backend, lambda: held_bytes(self._catalog))

    def stats(self) -> Stats:
        """Return what the store holds, counted now."""
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
        return found, self._catalog.tensors(found)

    def _decode(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorEntry],
        outs: Mapping[str, torch.Tensor],
    ) -> None:
        def decode() -> None:
            self._catalog.require_exists(checkpoint)
            what = f"checkpoint {checkpoint.id[:12]}"
            decode_state(self._catalog.objects, tensors, outs, base=checkpoint.base, what=what)

        read_consistently(self._backend, decode)
