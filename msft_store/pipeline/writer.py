"""Write checkpoints: encoded chunks into packs, then the manifest. Re-encode existing ones.

Invariants: the caller holds the store's lock and has refreshed the catalog. Everything that a
manifest needs is durable before the manifest is written, including files of other processes.
Nothing is deleted.

Example::

    writer = CheckpointWriter(catalog, backend)
    facts = CheckpointFacts.of(step=10, metrics={"arith": 0.41})
    ckpt = writer.save(
        state, facts, parent=base, references=None, compared=None
    )
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from msft_store._util import format_bytes
from msft_store.errors import (
    BaseError,
    CorruptedError,
    InvalidInputError,
    OutOfSpaceError,
    OverBudgetError,
)
from msft_store.format.layout import MAX_DEPTH, Record, canonical_json, digest
from msft_store.format.mapping import NOTHING, BaseMapping
from msft_store.format.strict_json import NUMBER_LIMIT
from msft_store.objects.bases import BASES, Base
from msft_store.objects.catalog import Catalog
from msft_store.objects.chain import REACH, allowed_depth, newest_allowed
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    CheckpointFacts,
    EncodedTable,
    Piece,
    TensorEntry,
    checkpoint_content,
    rewrite_manifest,
    tensor_table,
    write_manifest,
)
from msft_store.objects.packs import PACKS, PackWriter
from msft_store.objects.reachability import Dependents, find_dependents, own_bytes
from msft_store.objects.reference_planner import Table
from msft_store.pipeline.average import Term, encode_average
from msft_store.pipeline.counterparts import (
    MOST_MISSING,
    find_missing,
    map_by_names,
    map_to_base,
)
from msft_store.pipeline.decode import Source
from msft_store.pipeline.encode import (
    EncodeOptions,
    Reencoding,
    Totals,
    encode_boxes,
    encode_state,
    make_planner,
)
from msft_store.pipeline.parallel import for_each
from msft_store.storage.quota import QuotaBackend
from msft_store.tensors.boxes import Box, Part, Parts, join_parts, whole_box
from msft_store.tensors.bytes import memory_key
from msft_store.tensors.resident import Compared

_Place = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""A box: name and shape of its tensor, offset and shape."""
_LOG = logging.getLogger(__name__)
_WARNED: set[str] = set()
"""Ids of the bases for which this process has warned of tensors without a counterpart."""


@dataclass(frozen=True, kw_only=True)
class _Lineage:
    parent: str | None
    base: str | None
    tables: Sequence[Table]
    """What may be referred to."""
    max_depth: int
    """Largest depth of a record."""


class CheckpointWriter:
    """Writes the checkpoints of one store."""

    def __init__(self, catalog: Catalog, backend: QuotaBackend) -> None:
        self._catalog = catalog
        self._backend = backend
        self._durable_bases: set[str] = set()
        self._mappings: dict[str, tuple[set[_Place], BaseMapping]] = {}
        self._complete: BaseMapping | None = None
        """The mapping of the last save, if it was found to lack nothing that matters."""

    def save(
        self,
        state: Mapping[str, torch.Tensor] | Parts,
        facts: CheckpointFacts,
        *,
        parent: Base | Checkpoint | str | None,
        references: Sequence[Checkpoint] | None,
        compared: Compared | None,
    ) -> Checkpoint:
        """Write tensors as a checkpoint; return the existing one if its content is equal."""
        lineage = self._lineage(parent, references)
        parent_id, base = lineage.parent, lineage.base
        if isinstance(state, Parts):
            table, totals = self._join(state, base)
            mapping = functools.reduce(operator.or_, (part.mapping for part in state), NOTHING)
        else:
            boxes = [whole_box(name, tensor) for name, tensor in state.items()]
            mapping = self._map(boxes, base, parent_id)
            options = EncodeOptions(
                base=base,
                max_depth=lineage.max_depth,
                mapping=mapping,
                compared=compared,
            )
            whole = sum(tensor.nbytes for tensor in state.values())
            with self._encoding(whole) as begin:
                table, totals = encode_state(
                    self._catalog.objects, state, begin, options=options, tables=lineage.tables
                )
        return self._write(table, totals, facts, lineage, mapping)

    def average(
        self,
        checkpoints: Sequence[Checkpoint],
        weights: Sequence[float],
        facts: CheckpointFacts,
    ) -> Checkpoint:
        """Write the average of checkpoints with the same tensors, as a child of the last one."""
        last = checkpoints[-1]
        lineage, mapping = self._lineage(last, None), self._recorded(last.id)
        terms = [
            Term(
                source=Source.of(self._catalog, checkpoint),
                tensors=self._catalog.tensors(checkpoint),
                weight=weight,
            )
            for checkpoint, weight in zip(checkpoints, weights, strict=True)
        ]
        options = EncodeOptions(base=lineage.base, max_depth=lineage.max_depth, mapping=mapping)
        with self._encoding(last.logical_bytes) as begin:
            table, totals = encode_average(
                self._catalog.objects, terms, begin, options=options, tables=lineage.tables
            )
        return self._write(table, totals, facts, lineage, mapping)

    def _write(
        self,
        table: Mapping[str, TensorEntry],
        totals: Totals,
        facts: CheckpointFacts,
        lineage: _Lineage,
        mapping: BaseMapping,
    ) -> Checkpoint:
        """Write the manifest; return the existing checkpoint if its content is equal."""
        base = lineage.base
        line = tensor_table(table)
        content = checkpoint_content(
            facts,
            parent=lineage.parent,
            base=base,
            tensors=line,
            logical_bytes=sum(entry.nbytes for entry in table.values()),
        )
        known = self._catalog.find_intact(digest(canonical_json(content)))
        if known is not None:
            # Another process may have written the manifest and crashed before its fsync.
            self._backend.sync(MANIFESTS)
            return known
        checkpoint = write_manifest(
            self._backend,
            content,
            self._encoded(line, base, mapping),
            created=self._next_time(),
            stored_bytes=totals.stored_bytes,
            unreferenced_bytes=totals.unreferenced_bytes,
        )
        self._catalog.add(checkpoint)
        self._catalog.objects.refresh()
        if base is not None and base not in _WARNED and mapping is not self._complete:
            record = self._catalog.objects.base(base).base
            missing = find_missing(record, mapping, table)
            if missing.share > MOST_MISSING:
                _WARNED.add(base)
                _LOG.warning(missing.describe(record))
        return checkpoint

    def encode(
        self,
        boxes: Sequence[Box],
        *,
        parent: Base | Checkpoint | str | None,
        references: Sequence[Checkpoint] | None,
    ) -> Part:
        """Write the chunks of boxes; ``save`` makes a checkpoint of all processes' parts."""
        lineage = self._lineage(parent, references)
        base, mapping = lineage.base, self._map(boxes, lineage.base, lineage.parent)
        options = EncodeOptions(base=base, max_depth=lineage.max_depth, mapping=mapping)
        planner = make_planner(self._catalog.objects, options, lineage.tables)
        # Tied tensors are encoded once, under a name that has a reference if there is one.
        order = sorted(boxes, key=lambda box: not planner.knows(box.name, box.shape))
        firsts: dict[tuple[object, ...], Box] = {}
        for box in order:
            firsts.setdefault(_place(box), box)
        distinct = list(firsts.values())
        with self._encoding(sum(box.tensor.nbytes for box in distinct)) as begin:
            found, totals = encode_boxes(
                self._catalog.objects, distinct, begin, options=options, planner=planner
            )
        self._catalog.objects.refresh()
        entries = dict(zip(firsts, found, strict=True))
        pieces: dict[str, tuple[Piece, ...]] = {}
        for box in boxes:
            pieces[box.name] = (*pieces.get(box.name, ()), *entries[_place(box)].pieces)
        table = {box.name: box.entry() for box in boxes}
        return Part(
            base=base,
            tensors={name: replace(table[name], pieces=pieces[name]) for name in table},
            stored_bytes=totals.stored_bytes,
            unreferenced_bytes=totals.unreferenced_bytes,
            mapping=mapping,
        )

    def _map(
        self,
        boxes: Sequence[Box],
        base: str | None,
        parent: str | None,
    ) -> BaseMapping:
        """Return the counterparts of tensors in a base: those of the parent, or else search."""
        if base is None:
            return NOTHING
        reader, table = self._catalog.objects.base(base), {box.name: box.entry() for box in boxes}
        here = {(box.name, box.shape, box.offset, tuple(box.tensor.shape)) for box in boxes}
        places, known = self._mappings.get(base, (set(), NOTHING))
        checkpoint = self._catalog.get(parent or "")
        if checkpoint is not None:
            tensors, known = self._catalog.tensors(checkpoint), self._recorded(checkpoint.id)
            shapes = {name: entry.shape for name, entry in tensors.items()}
            places = {place for place in here if shapes.get(place[0]) == place[1]}
        if here <= places:
            names = {name: old for name, old in known.names.items() if name in table}
            views = {name: view for name, view in known.views.items() if name in table}
            mapping = BaseMapping(names=names, views=views)
            # A search while the base was out of reach found less than there is.
            if find_missing(reader.base, mapping, table).share <= MOST_MISSING:
                self._complete = mapping
                return mapping
        found = map_to_base(reader, boxes)
        if self._catalog.config.version == 1:
            # Packs of version 1 have no references into views.
            found = replace(found, views={})
        self._mappings[base] = here, found
        return found

    def _recorded(self, checkpoint: str) -> BaseMapping:
        """Return the counterparts of a checkpoint's tensors; a manifest of version 1 has none."""
        found = self._catalog.resolve(checkpoint)
        mapping = self._catalog.tables.mapping(found)
        if mapping or found.base is None:
            return mapping
        shapes = {name: entry.shape for name, entry in self._catalog.tensors(found).items()}
        return map_by_names(self._catalog.objects.base(found.base).base, shapes)

    def _lineage(
        self, parent: Base | Checkpoint | str | None, references: Sequence[Checkpoint] | None
    ) -> _Lineage:
        """Return the parent, its base and what may be referred to; the base is durable.

        Without ``references``, the nearest of the ancestors that the position allows is one.
        """
        parent_id, base, checkpoint = self._catalog.resolve_parent(parent)
        if base is not None and base not in self._durable_bases:
            self._backend.sync(BASES)
            self._durable_bases.add(base)
        if references is not None:
            found = list(references) if checkpoint is None else [*references, checkpoint]
        else:
            found = [] if checkpoint is None else self._nearest_ancestor(checkpoint)
        found = list({one.id: one for one in found}.values())
        tables: list[Table] = [self._catalog.tensors(one) for one in found]
        deepest = max(map(self._catalog.depth, found), default=0)
        return _Lineage(
            parent=parent_id,
            base=base,
            tables=tables if base is None else [*tables, None],
            max_depth=min(deepest + 1, MAX_DEPTH[self._catalog.config.version]),
        )

    def _nearest_ancestor(self, parent: Checkpoint) -> list[Checkpoint]:
        ancestors = list(self._catalog.lineage(parent))
        near = self.nearest(ancestors, position=len(ancestors))
        # Without a base, the oldest ancestor is what the others are differences of.
        return [near] if near else ancestors[-1:] if parent.base is None else []

    def nearest(self, checkpoints: Sequence[Checkpoint], *, position: int) -> Checkpoint | None:
        """Return the first checkpoint that one at a position of their history may refer to.

        ``checkpoints`` are those that are still there, the newest first.
        """
        limit = MAX_DEPTH[self._catalog.config.version]
        allowed = min(allowed_depth(position, len(checkpoints)), limit)
        near = checkpoints[:REACH]
        place = newest_allowed(allowed, map(self._catalog.depth, near))
        return None if place is None else near[place]

    def _join(self, parts: Parts, base: str | None) -> tuple[dict[str, TensorEntry], Totals]:
        """Return the tensor table of parts after a check that all their chunks are durable."""
        if any(part.base != base for part in parts):
            raise InvalidInputError(
                "a part was encoded against another base than the checkpoint's: give all processes "
                "the same parent"
            )
        table, objects = join_parts(parts), self._catalog.objects
        # Another process may have written a pack and crashed before its fsync.
        self._backend.sync(PACKS)
        objects.refresh()

        def require(chunk: tuple[str, bytes]) -> None:
            name, key = chunk
            stored = objects.find(key, base)
            packed = stored is not None and objects.has_all_references(stored.record)
            if not packed and not objects.is_in_base(key, base):
                raise InvalidInputError(
                    f"a chunk of {name!r} that a process encoded is not in this store: another "
                    "process collected garbage in between, it was encoded into another store, or "
                    "the base changed since. Hold gc off with Store.awaiting_parts from before "
                    "Store.encode until the save, give all processes the same store, and encode "
                    "again"
                )

        for_each(require, ((n, key) for n, entry in table.items() for key, _ in entry.chunks()))
        return table, Totals(
            stored_bytes=sum(part.stored_bytes for part in parts),
            unreferenced_bytes=sum(part.unreferenced_bytes for part in parts),
        )

    def anchor(self, checkpoint: Checkpoint) -> Checkpoint:
        """Re-encode a checkpoint so that it needs nothing but its base."""
        with self._packing([]) as begin:
            self._reencode(checkpoint, begin)
        found = self._record_size(checkpoint)
        self._sync_if_unchanged([(checkpoint, found)])
        return found

    def rebase(self, checkpoints: Sequence[Checkpoint], onto: Checkpoint) -> list[Checkpoint]:
        """Re-encode checkpoints as changes of another one, each if that frees more than it takes.

        Raises:
            InvalidInputError: A checkpoint has another base than ``onto``.
        """
        for checkpoint in checkpoints:
            if checkpoint.base != onto.base:
                raise InvalidInputError(
                    f"checkpoints {checkpoint.id[:12]} and {onto.id[:12]} have different bases"
                )
        tensors = self._catalog.tensors(onto) if checkpoints else {}
        found = []
        for checkpoint in checkpoints:
            held = own_bytes(self._catalog, checkpoint) - self._catalog.stored_bytes(checkpoint)
            if held > 0:
                self._rebase_if_smaller(checkpoint, tensors, held)
            found.append(self._record_size(checkpoint))
        self._sync_if_unchanged(list(zip(checkpoints, found, strict=True)))
        return found

    def _rebase_if_smaller(
        self, checkpoint: Checkpoint, onto: Mapping[str, TensorEntry], held: int
    ) -> None:
        """Re-encode a checkpoint; discard the packs unless they take less than they free.

        ``held`` bytes of other checkpoints become free as well.
        """
        packs: list[PackWriter] = []
        with self._packing(packs) as begin:
            self._reencode(checkpoint, begin, onto)
            new = {record.key: record.length for pack in packs for record in pack.records}
            old = (self._catalog.objects.find(key, checkpoint.base) for key in new)
            replaced = sum(stored.record.length for stored in old if stored is not None)
            if sum(new.values()) >= replaced + held:
                packs.clear()

    def _reencode(
        self,
        checkpoint: Checkpoint,
        begin: Callable[[], PackWriter],
        onto: Mapping[str, TensorEntry] | None = None,
    ) -> None:
        keys = {key for entry in (onto or {}).values() for key, _ in entry.chunks()}
        tables = [] if onto is None else [onto]
        self._reencoding(
            checkpoint,
            tables,
            lambda record: not record.refers_to_chunk or record.ref_key in keys,
        ).encode(begin)

    def release(self, checkpoints: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
        """Re-encode checkpoints that refer to forgotten ones, where that frees more than it takes.

        Each is encoded against the base or one of the others that is near to it, and then yielded.
        """
        ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.created)
        depths = {checkpoint.id: self._catalog.depth(checkpoint) for checkpoint in ordered}
        for group in find_dependents(self._catalog, ordered):
            try:
                works = self._plan_release(group, ordered, depths)
                for work, checkpoint in zip(works, group.checkpoints, strict=False):
                    with self._packing([]) as begin:
                        work.encode(begin)
                    yield self._record_size(checkpoint)
            except (CorruptedError, BaseError) as error:
                # A save does without what is damaged, and so may go on with a damaged history.
                _LOG.warning("%d bytes are not freed: %s", group.held_bytes, error)

    def _plan_release(
        self, group: Dependents, ordered: Sequence[Checkpoint], depths: dict[str, int]
    ) -> list[Reencoding]:
        """Choose new references for checkpoints; return nothing if that would free no bytes.

        ``depths`` become those after the work.
        """
        works, more, after = [], 0.0, dict(depths)
        for checkpoint in group.checkpoints:
            near = _neighbours(checkpoint, ordered, after)
            tables: list[Table] = [self._catalog.tensors(one) for one in near]
            if checkpoint.base is not None:
                tables.append(None)
            if not tables:
                return []
            work = self._reencoding(checkpoint, tables, partial(_is_free_of, group.held))
            table, growth = work.prefer_smallest()
            number = next(at for at, one in enumerate(tables) if one is table)
            after[checkpoint.id] = 1 + (after[near[number].id] if table is not None else 0)
            works.append(work)
            more += growth
        if more >= group.held_bytes:
            return []
        depths |= after
        return works

    def _reencoding(
        self, checkpoint: Checkpoint, tables: Sequence[Table], is_done: Callable[[Record], bool]
    ) -> Reencoding:
        return Reencoding(
            self._catalog.objects,
            self._catalog.tensors(checkpoint),
            options=EncodeOptions(
                base=checkpoint.base,
                max_depth=MAX_DEPTH[self._catalog.config.version],
                mapping=self._recorded(checkpoint.id),
            ),
            tables=tables,
            is_done=is_done,
        )

    def _record_size(self, checkpoint: Checkpoint) -> Checkpoint:
        """Write the bytes that a checkpoint takes now into its manifest, if they changed."""
        stored_bytes = self._catalog.stored_bytes(checkpoint)
        if stored_bytes == checkpoint.stored_bytes:
            return checkpoint
        found = rewrite_manifest(self._backend, checkpoint, stored_bytes=stored_bytes)
        self._catalog.add(found)
        return found

    def _sync_if_unchanged(self, pairs: Sequence[tuple[Checkpoint, Checkpoint]]) -> None:
        if any(found is checkpoint for checkpoint, found in pairs):
            # Another process may have re-encoded the checkpoint and crashed before its fsync. Sync
            # both folders, so that we never report success for data that a power loss could take.
            self._backend.sync(PACKS)
            self._backend.sync(MANIFESTS)

    @contextlib.contextmanager
    def _encoding(self, whole: int) -> Iterator[Callable[[], PackWriter]]:
        """Write the packs of ``whole`` bytes; an error for lack of room says what is missing."""
        packs: list[PackWriter] = []
        try:
            with self._packing(packs) as begin:
                yield begin
        except (OutOfSpaceError, OverBudgetError) as error:
            written = sum(pack.position for pack in packs)
            raise type(error)(
                f"{error}; {format_bytes(written)} were encoded, and the rest of this save needs "
                f"up to {format_bytes(max(whole - written, 0))}. Nothing was saved and nothing was "
                "lost"
            ) from error

    @contextlib.contextmanager
    def _packing(self, packs: list[PackWriter]) -> Iterator[Callable[[], PackWriter]]:
        """Yield a function that begins a pack and adds it to ``packs``; finish them at the end."""
        with contextlib.ExitStack() as stack:

            def begin() -> PackWriter:
                writer = stack.enter_context(self._backend.writer())
                packs.append(PackWriter(writer, self._catalog.config.version))
                return packs[-1]

            yield begin
            for pack in packs:
                pack.finalize()
            if packs:
                self._catalog.objects.refresh()
            else:
                # All chunks exist already. The process that wrote them may have crashed before its
                # fsync.
                self._backend.sync(PACKS)

    def _encoded(
        self, table: bytes, base: str | None, mapping: BaseMapping
    ) -> bytes | EncodedTable:
        """Return a tensor table in the form of the store's version."""
        catalog = self._catalog
        return table if catalog.config.version == 1 else catalog.tables.encode(table, base, mapping)

    def _next_time(self) -> int:
        # Later than every other checkpoint, so that the log is in order even if a clock goes back.
        known = self._catalog.checkpoints()
        later = max(time.time_ns(), known[-1].created + 1 if known else 0)
        return min(later, NUMBER_LIMIT - 1)


def _neighbours(
    checkpoint: Checkpoint, ordered: Sequence[Checkpoint], depths: Mapping[str, int]
) -> list[Checkpoint]:
    """Return the nearest checkpoints before and after one that are less deep."""
    at = ordered.index(checkpoint)
    sides = (reversed(ordered[:at]), ordered[at + 1 :])
    less = [[c for c in side if depths[c.id] < depths[checkpoint.id]] for side in sides]
    return [side[0] for side in less if side and side[0].base == checkpoint.base]


def _is_free_of(keys: frozenset[bytes], record: Record) -> bool:
    return keys.isdisjoint(record.chunk_keys)


def _place(box: Box) -> tuple[object, ...]:
    return (memory_key(box.tensor), box.shape, box.offset)
