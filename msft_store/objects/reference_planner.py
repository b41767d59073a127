"""Choose the reference of each chunk that is encoded as a difference.

Invariant: a record that uses a chosen reference is at most ``max_depth`` deep.

Example::

    tables = [nearest_tensors, root_tensors]
    planner = ReferencePlanner(objects, base.id, tables, mapping, max_depth=16)
    planner.reference("lm_head.weight", entry, piece=0, chunk=0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msft_store.format.layout import CHUNK_BYTES, MAX_DEPTH, BaseSpan, ChunkSpan, ViewSpan
from msft_store.format.mapping import BaseMapping, View
from msft_store.objects.base_reader import can_convert
from msft_store.objects.bases import BaseTensor
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Piece, TensorEntry, chunks_of


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The data that a chunk is encoded against, and the base that is needed to read it.

    ``depth`` is that of a record that uses it. The span is elements of the base or of a view of it,
    a whole chunk, or consecutive parts of several chunks.
    """

    base: str | None
    depth: int
    span: BaseSpan | ViewSpan | ChunkSpan | tuple[ChunkSpan, ...]


Table = Mapping[str, TensorEntry] | None
"""The tensor table of a checkpoint, or ``None`` for the base."""


class ReferencePlanner:
    """Chooses the chunk at the same position of a checkpoint, or the base's elements.

    The first of several tables that has the tensor serves, and the base if none has. If the chunk
    of a checkpoint is already at the maximum depth, its own reference is used instead. If the two
    checkpoints are cut into different pieces, but both along the first dimension only, the
    reference consists of the parts of the chunks that hold the same elements.
    """

    def __init__(
        self,
        objects: ChunkStore,
        base: str | None,
        tables: Sequence[Table],
        mapping: BaseMapping,
        *,
        max_depth: int,
    ) -> None:
        """Plan with the tensor tables of checkpoints and the base, the preferred one first."""
        self._objects = objects
        self._base = base
        self.tables = tables
        self._mapping = mapping
        self._max_depth = max_depth
        self._base_tensors: Mapping[str, BaseTensor] = {}
        if base is not None:
            self._base_tensors = objects.base(base).base.tensors

    def knows(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return True if a tensor may have references."""
        if any(table and name in table for table in self.tables):
            return True
        return self._counterpart(name, shape) is not None

    def _counterpart(self, name: str, shape: tuple[int, ...]) -> str | View | None:
        """Return the base's tensor or view that a tensor may refer to, or ``None``."""
        view = self._mapping.views.get(name)
        if view is not None and view.shape == shape:
            return view
        other = self._mapping.names.get(name, name)
        tensor = self._base_tensors.get(other)
        return other if tensor is not None and tensor.shape == shape else None

    def reference(self, name: str, entry: TensorEntry, piece: int, chunk: int) -> Reference | None:
        """Return the reference of one chunk, or ``None``."""
        for table in (*self.tables, None):
            found = self.reference_in(table, name, entry, piece, chunk)
            if found is not None:
                return found
        return None

    def reference_in(
        self, table: Table, name: str, entry: TensorEntry, piece: int, chunk: int
    ) -> Reference | None:
        """Return the reference of one chunk in one table, or ``None``."""
        if table is None:
            return self._in_base(name, entry, entry.pieces[piece], chunk)
        other = table.get(name)
        if other is None or (other.dtype, other.shape) != (entry.dtype, entry.shape):
            return None
        return self._in_checkpoint(other, entry.pieces[piece], chunk)

    def _in_base(self, name: str, entry: TensorEntry, box: Piece, chunk: int) -> Reference | None:
        match = self._counterpart(name, entry.shape)
        if match is None:
            return None
        used = [match] if isinstance(match, str) else [part.tensor for part in match.parts]
        if not all(can_convert(self._base_tensors[one].dtype, entry.dtype) for one in used):
            return None
        start = chunk * CHUNK_BYTES // entry.dtype.size
        cut = None if box.shape == entry.shape else (box.offset, box.shape)
        span: BaseSpan | ViewSpan
        if isinstance(match, str):
            span = BaseSpan(tensor=match, start=start, box=cut)
        else:
            span = ViewSpan(view=match, start=start, box=cut)
        return Reference(base=self._base, depth=1, span=span)

    def _in_checkpoint(self, other: TensorEntry, box: Piece, chunk: int) -> Reference | None:
        for piece in other.pieces:
            if (piece.offset, piece.shape) == (box.offset, box.shape):
                rest = math.prod(box.shape) * other.dtype.size - chunk * CHUNK_BYTES
                return self._chunk(piece.keys[chunk], min(rest, CHUNK_BYTES))
        return self._spanning(other, box, chunk)

    def _spanning(self, other: TensorEntry, box: Piece, chunk: int) -> Reference | None:
        """Return the parts of a checkpoint's chunks that hold the elements of a box's chunk."""
        if not all(is_by_rows(piece, other.shape) for piece in (box, *other.pieces)):
            return None
        row = math.prod(other.shape[1:]) * other.dtype.size
        begin = (box.offset[0] if box.offset else 0) * row + chunk * CHUNK_BYTES
        end = begin + min(
            math.prod(box.shape) * other.dtype.size - chunk * CHUNK_BYTES, CHUNK_BYTES
        )
        spans: list[ChunkSpan] = []
        base: str | None = None
        depth = 1
        for piece in sorted(other.pieces, key=lambda piece: piece.offset):
            at = (piece.offset[0] if piece.offset else 0) * row
            for key, size in chunks_of(piece, other.dtype):
                first, last = max(begin, at), min(end, at + size)
                if first < last:
                    found = self._chunk(key, size)
                    if found is None:
                        return None
                    chunk_key = found.span.key if isinstance(found.span, ChunkSpan) else key
                    base, depth = base or found.base, max(depth, found.depth)
                    spans.append(ChunkSpan(key=chunk_key, start=first - at, length=last - first))
                at += size
        # A reader refuses several parts at a greater depth, for they would multiply at each level.
        most = self._max_depth if len(spans) == 1 else min(self._max_depth, MAX_DEPTH[1])
        fits = spans and depth <= most
        return Reference(base=base, depth=depth, span=tuple(spans)) if fits else None

    def _chunk(self, key: bytes, size: int) -> Reference | None:
        located, stored = (
            self._objects.find_in_base(key, self._base),
            self._objects.find(key, self._base),
        )
        if located is not None and (stored is None or self._objects.is_in_base(key, self._base)):
            return Reference(base=self._base, depth=1, span=located)
        if stored is None:
            return None
        record = stored.record
        if record.depth < self._max_depth:
            span = ChunkSpan(key=key, start=0, length=size)
            return Reference(base=record.base, depth=record.depth + 1, span=span)
        if record.reference is None and record.refers_to_chunk:
            return self._chunk(record.ref_key, size)
        return None


def is_by_rows(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Return True if a piece is cut along the first dimension only, and so is contiguous."""
    return piece.shape[1:] == shape[1:]
