"""Writes of checkpoints: encoded chunks into packs, then the manifest; and the same anew.

Invariants: who calls holds the store's lock; a manifest is written after all that it needs is
durable, also what others left visible only; nothing is deleted.

Example::

    writer = CheckpointWriter(catalog, backend)
    ckpt = writer.save(state, parent=base, step=10, metrics={"arith": 0.41}, level="fast")
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from msft_store._util import human
from msft_store.codec.codecs import Level
from msft_store.errors import InvalidInputError, OutOfSpaceError, OverBudgetError
from msft_store.format.layout import canonical, digest
from msft_store.format.strict_json import LIMIT
from msft_store.objects.bases import BASES, Base
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    Piece,
    TensorEntry,
    checkpoint_content,
    rewrite_manifest,
    tensor_table,
    write_manifest,
)
from msft_store.objects.packs import PACKS, PackWriter
from msft_store.objects.reachability import own_bytes
from msft_store.objects.reference_planner import Planner
from msft_store.pipeline.encode import Totals, encode_anew, encode_boxes, encode_state, table_bytes
from msft_store.storage.quota import Bounded
from msft_store.tensors.boxes import Box, Part, Parts, joined
from msft_store.tensors.bytes import memory_of
from msft_store.tensors.resident import Compared

_T = TypeVar("_T")


class CheckpointWriter:
    """Writes the checkpoints of one store; its methods want a catalog that is refreshed."""

    def __init__(self, catalog: Catalog, backend: Bounded) -> None:
        self._catalog = catalog
        self._backend = backend
        self._durable_bases: set[str] = set()

    def save(
        self,
        state: Mapping[str, torch.Tensor] | Parts,
        *,
        parent: Base | Checkpoint | str | None,
        step: int | None,
        metrics: Mapping[str, float],
        tags: Sequence[str],
        metadata: Mapping[str, Any],
        level: Level,
        compared: Compared | None,
    ) -> Checkpoint:
        """Write tensors as a checkpoint; return the one that is there if its content is equal."""
        content_of = partial(
            checkpoint_content, step=step, metrics=metrics, tags=tags, metadata=metadata
        )
        # Refused before anything is written.
        content_of(parent=None, base=None, tensors=b"", logical_bytes=0)
        parent_id, base, parent_tensors = self._lineage(parent)
        if isinstance(state, Parts):
            table, totals = self._joined(state, base)
        else:
            table, totals = self._encode(
                lambda begin: encode_state(
                    self._catalog.objects,
                    state,
                    begin,
                    base=base,
                    parent=parent_tensors,
                    level=level,
                    compared=compared,
                ),
                least=table_bytes(state),
                whole=sum(tensor.nbytes for tensor in state.values()),
            )
        line = tensor_table(table)
        content = content_of(
            parent=parent_id,
            base=base,
            tensors=line,
            logical_bytes=sum(entry.nbytes for entry in table.values()),
        )
        known = self._catalog.intact(digest(canonical(content)))
        if known is not None:
            self._backend.sync(MANIFESTS)
            return known
        checkpoint = write_manifest(
            self._backend,
            content,
            line,
            created=self._next_time(),
            stored_bytes=totals.stored_bytes,
            unreferenced_bytes=totals.unreferenced_bytes,
        )
        self._catalog.add(checkpoint)
        self._catalog.objects.refresh()
        return checkpoint

    def encode(
        self,
        boxes: Sequence[Box],
        *,
        parent: Base | Checkpoint | str | None,
        level: Level,
    ) -> Part:
        """Write the chunks of boxes; a checkpoint that is saved of parts makes something of it."""
        _, base, parent_tensors = self._lineage(parent)
        planner = Planner(self._catalog.objects, base, parent_tensors)
        planner.match({box.name: box.shape for box in boxes})
        # Tied ones are encoded once, under the name that has something to be compared with.
        order = sorted(boxes, key=lambda box: not planner.knows(box.name))
        firsts: dict[tuple[object, ...], Box] = {}
        for box in order:
            firsts.setdefault(_place(box), box)
        once = list(firsts.values())
        found, totals = self._encode(
            lambda begin: encode_boxes(
                self._catalog.objects, once, begin, planner=planner, base=base, level=level
            ),
            least=0,
            whole=sum(box.tensor.nbytes for box in once),
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
        )

    def _lineage(
        self, parent: Base | Checkpoint | str | None
    ) -> tuple[str | None, str | None, Mapping[str, TensorEntry] | None]:
        """Return the ids of the parent and of its base, which is durable, and its tensors."""
        parent_id, base, tensors = self._catalog.lineage(parent)
        if base is not None and base not in self._durable_bases:
            self._backend.sync(BASES)
            self._durable_bases.add(base)
        return parent_id, base, tensors

    def _joined(self, parts: Parts, base: str | None) -> tuple[dict[str, TensorEntry], Totals]:
        """Return the table of parts, all of whose chunks are there, durably."""
        if any(part.base != base for part in parts):
            raise InvalidInputError(
                "a part was encoded against another base than the checkpoint's: give all processes "
                "the same parent"
            )
        table, objects = joined(parts), self._catalog.objects
        # What another process published may be visible only.
        self._backend.sync(PACKS)
        objects.refresh()
        for name, entry in table.items():
            for key in (key for piece in entry.pieces for key in piece.keys):
                stored = objects.find(key, base)
                if objects.in_base(key, base) is None and (
                    stored is None or not objects.is_whole(stored.record)
                ):
                    raise InvalidInputError(
                        f"a chunk of {name!r} that a process encoded is not in this store: another "
                        "process collected garbage in between, or it was encoded into another "
                        "store. Hold gc off with Store.awaiting_parts from before Store.encode "
                        "until the save, give all processes the same store, and encode again"
                    )
        return table, Totals(
            stored_bytes=sum(part.stored_bytes for part in parts),
            unreferenced_bytes=sum(part.unreferenced_bytes for part in parts),
        )

    def anchor(self, checkpoint: Checkpoint) -> Checkpoint:
        """Encode a checkpoint anew so that it needs nothing but its base."""
        packs: list[PackWriter] = []
        with self._packing(packs) as begin:
            encode_anew(
                self._catalog.objects,
                self._catalog.tensors(checkpoint),
                begin,
                base=checkpoint.base,
                level=self._catalog.level,
            )
        return self._encoded_anew(checkpoint)

    def rebase(self, checkpoint: Checkpoint, onto: Checkpoint) -> Checkpoint:
        """Encode a checkpoint anew as a change of another, if that frees more than it takes.

        :class:`InvalidInputError` if the two have different bases.
        """
        if checkpoint.base != onto.base:
            raise InvalidInputError(
                f"checkpoints {checkpoint.id[:12]} and {onto.id[:12]} have different bases"
            )
        held = own_bytes(self._catalog, checkpoint) - self._catalog.stored_bytes(checkpoint)
        if held <= 0:
            return self._encoded_anew(checkpoint)
        packs: list[PackWriter] = []
        with self._packing(packs) as begin:
            encode_anew(
                self._catalog.objects,
                self._catalog.tensors(checkpoint),
                begin,
                base=checkpoint.base,
                level=self._catalog.level,
                onto=self._catalog.tensors(onto),
            )
            new = {record.key: record.length for pack in packs for record in pack.records}
            old = (self._catalog.objects.find(key, checkpoint.base) for key in new)
            replaced = sum(stored.record.length for stored in old if stored is not None)
            if sum(new.values()) >= replaced + held:
                packs.clear()
        return self._encoded_anew(checkpoint)

    def _encoded_anew(self, checkpoint: Checkpoint) -> Checkpoint:
        """Record what a checkpoint takes now, also where a crash came before that was done."""
        self._catalog.refresh()
        stored_bytes = self._catalog.stored_bytes(checkpoint)
        if stored_bytes == checkpoint.stored_bytes:
            # All is done already, by somebody who may not have got it durable.
            self._backend.sync(PACKS)
            self._backend.sync(MANIFESTS)
            return checkpoint
        found = rewrite_manifest(self._backend, checkpoint, stored_bytes=stored_bytes)
        self._catalog.add(found)
        return found

    def _encode(
        self, encode: Callable[[Callable[[], PackWriter]], _T], *, least: int, whole: int
    ) -> _T:
        """Encode ``whole`` bytes into packs; ``least`` more will be written besides."""
        packs: list[PackWriter] = []
        try:
            with self._packing(packs, least=least) as begin:
                return encode(begin)
        except (OutOfSpaceError, OverBudgetError) as error:
            written = sum(pack.position for pack in packs)
            raise type(error)(
                f"{error}; {human(written)} were encoded, and the rest of this save needs up to "
                f"{human(max(whole - written, 0))}. Nothing was saved and nothing was lost"
            ) from error

    @contextlib.contextmanager
    def _packing(
        self, packs: list[PackWriter], *, least: int = 0
    ) -> Iterator[Callable[[], PackWriter]]:
        """Give what begins a pack, added to ``packs``; all are published at the end.

        None is begun if ``least`` bytes, which will be written besides, certainly do not fit.
        """
        with contextlib.ExitStack() as stack:

            def begin() -> PackWriter:
                self._backend.require(least)
                packs.append(PackWriter(stack.enter_context(self._backend.writer())))
                return packs[-1]

            yield begin
            for pack in packs:
                pack.publish()
            if not packs:
                # All is there already, from somebody who may not have got it durable.
                self._backend.sync(PACKS)

    def _next_time(self) -> int:
        # Later than every other, so that the log is in order even where a clock goes back.
        known = self._catalog.checkpoints()
        later = max(time.time_ns(), known[-1].created + 1 if known else 0)
        return min(later, LIMIT - 1)


def _place(box: Box) -> tuple[object, ...]:
    return (memory_of(box.tensor), box.shape, box.offset)
