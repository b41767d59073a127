"""Decode parts of tensors from a checkpoint with other pieces, for loads by other processes.

Invariants: every chunk is verified, and only chunks with a wanted element are read. At most a few
chunks are in memory at a time, and if a piece is not split by rows, also some rows of that piece.

Example::

    decode_boxes(Source.of(catalog, checkpoint), entries, boxes)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from msft_store.errors import MismatchError
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.objects.manifest import Piece, TensorEntry
from msft_store.objects.reference_planner import is_by_rows
from msft_store.pipeline.decode import ChunkRead, Source, list_reads
from msft_store.pipeline.parallel import for_each
from msft_store.tensors.boxes import Box
from msft_store.tensors.bytes import torch_dtype, view_bytes, write_elements
from msft_store.tensors.names import plain_name, plain_names

_BAND_BYTES = 16 * CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class _Overlap:
    """The part of a tensor that is in both a piece and a box."""

    name: str
    entry: TensorEntry
    piece: Piece
    start: tuple[int, ...]
    """Its first index in the piece, for each dimension."""
    target: torch.Tensor
    """The memory of this part in the box."""

    @property
    def rows(self) -> int:
        return self.target.shape[0] if self.target.dim() else 1

    @property
    def row(self) -> int:
        """Number of elements in a row of the piece."""
        return math.prod(self.piece.shape[1:])

    def list_reads(self, target: torch.Tensor) -> Iterator[ChunkRead]:
        """Yield the reads that restore the complete rows of the overlap to ``target``."""
        begin = self.start[0] * self.row if self.start else 0
        dtype = self.entry.dtype
        return list_reads(self.name, dtype, self.piece, target, begin=begin, in_place=False)


def decode_boxes(source: Source, tensors: Mapping[str, TensorEntry], boxes: Iterable[Box]) -> None:
    """Fill the tensors of boxes, on any device and of any layout, from a checkpoint.

    Raise :class:`MismatchError`, before any change, if the checkpoint lacks a tensor of that name,
    shape and dtype, and :class:`StoreError` at the first damaged chunk, after some boxes changed.
    """
    tensors = {**plain_names(tensors), **tensors}
    wanted = [b if b.name in tensors else replace(b, name=plain_name(b.name)) for b in boxes]
    for box in wanted:
        _check(box, tensors, source.name)
    overlaps = [overlap for box in wanted for overlap in _overlaps(box, tensors[box.name])]
    contiguous = (overlap for overlap in overlaps if _is_contiguous(overlap))
    reads = (read for overlap in contiguous for read in overlap.list_reads(overlap.target))
    for_each(source.restore, reads)
    for overlap in overlaps:
        if not _is_contiguous(overlap):
            for band in _bands(overlap):
                _decode_across(source, band)


def _is_contiguous(overlap: _Overlap) -> bool:
    """Return True if the overlap is one contiguous range of bytes of the piece."""
    shape = tuple(overlap.target.shape)
    return is_by_rows(Piece(offset=overlap.start, shape=shape, keys=()), overlap.piece.shape)


def _check(box: Box, tensors: Mapping[str, TensorEntry], what: str) -> None:
    entry = tensors.get(box.name)
    if entry is None:
        raise MismatchError(f"{what} lacks {box.name}. Nothing was changed")
    dtype = dtype_by_torch(box.tensor.dtype)
    if (entry.shape, entry.dtype) != (box.shape, dtype):
        raise MismatchError(
            f"{box.name} is {box.shape} of {dtype.name}, in {what} {entry.shape} of "
            f"{entry.dtype.name}. Nothing was changed"
        )


def _overlaps(box: Box, entry: TensorEntry) -> Iterator[_Overlap]:
    for piece in entry.pieces:
        sides = zip(piece.offset, piece.shape, box.offset, box.tensor.shape, strict=True)
        ranges = [
            (max(there, here), min(there + size, here + length))
            for there, size, here, length in sides
        ]
        if math.prod(piece.shape) and all(first < end for first, end in ranges):
            inside = zip(ranges, box.offset, strict=True)
            place = tuple(slice(first - here, end - here) for (first, end), here in inside)
            yield _Overlap(
                name=box.name,
                entry=entry,
                piece=piece,
                start=tuple(r[0] - at for r, at in zip(ranges, piece.offset, strict=True)),
                target=box.tensor.detach()[place] if place else box.tensor.detach(),
            )


def _bands(overlap: _Overlap) -> Iterator[_Overlap]:
    """Split an overlap into bands of a few rows; a chunk in two bands is read twice."""
    first, *rest = overlap.start
    rows = max(1, _BAND_BYTES // (overlap.row * overlap.entry.dtype.size))
    for at in range(0, overlap.rows, rows):
        target = overlap.target[at : at + rows]
        yield replace(overlap, start=(first + at, *rest), target=target)


def _decode_across(source: Source, overlap: _Overlap) -> None:
    """Decode complete rows of a piece, then copy the wanted part of each row."""
    shape = overlap.rows, *overlap.piece.shape[1:]
    rows = torch.empty(shape, dtype=torch_dtype(overlap.entry.dtype))
    for_each(source.restore, overlap.list_reads(rows))
    sides = zip(overlap.start[1:], overlap.target.shape[1:], strict=True)
    place = (slice(None), *(slice(first, first + size) for first, size in sides))
    write_elements(overlap.target, 0, view_bytes(rows[place].contiguous()))
