"""Decode parts of tensors from a checkpoint with other pieces, for loads by other processes.

Invariants: every chunk is verified, and only chunks with a wanted element are read. At most a few
chunks are in memory at a time, and if a piece is not split by rows, also some rows of that piece.

Example::

    decode_boxes(objects, entries, boxes, base=base.id, what="checkpoint 3fa9")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch

from msft_store.codec.kernels import Bytes
from msft_store.errors import MismatchError
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Piece, TensorEntry, chunk_sizes
from msft_store.objects.reference_planner import is_by_rows
from msft_store.pipeline.decode import named
from msft_store.pipeline.parallel import in_order
from msft_store.tensors.boxes import Box
from msft_store.tensors.bytes import torch_dtype, view_bytes, write_elements

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
    def first_row(self) -> int:
        return self.start[0] if self.start else 0

    @property
    def rows(self) -> int:
        return self.target.shape[0] if self.target.dim() else 1

    @property
    def row(self) -> int:
        """Number of elements in a row of the piece."""
        return math.prod(self.piece.shape[1:])


def decode_boxes(
    objects: ChunkStore,
    tensors: Mapping[str, TensorEntry],
    boxes: Iterable[Box],
    *,
    base: str | None,
    what: str,
) -> None:
    """Fill the tensors of boxes, on any device and of any layout, from a checkpoint.

    Raise :class:`MismatchError`, before any change, if the checkpoint lacks a tensor of that name,
    shape and dtype, and :class:`StoreError` at the first damaged chunk, after some boxes changed.
    """
    wanted = list(boxes)
    for box in wanted:
        _check(box, tensors, what)
    overlaps = [overlap for box in wanted for overlap in _overlaps(box, tensors[box.name])]
    simple = (
        job
        for overlap in overlaps
        if _is_a_run(overlap)
        for job in _jobs(objects, overlap, overlap.target, base, what)
    )
    with closing(in_order(lambda job: job(), simple)) as done:
        for _ in done:
            pass
    for overlap in overlaps:
        if not _is_a_run(overlap):
            for band in _bands(overlap):
                _decode_across(objects, band, base, what)


def _is_a_run(overlap: _Overlap) -> bool:
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


def _jobs(
    objects: ChunkStore, overlap: _Overlap, target: torch.Tensor, base: str | None, what: str
) -> Iterator[Callable[[], None]]:
    """Yield one job for each chunk, which writes its rows of the overlap to ``target``."""
    dtype = overlap.entry.dtype
    begin = overlap.first_row * overlap.row
    end = begin + overlap.rows * overlap.row
    at = 0
    for key, size in zip(overlap.piece.keys, chunk_sizes(overlap.piece, dtype), strict=True):
        count = size // dtype.size
        first, last = max(begin, at), min(end, at + count)
        if first < last:
            yield partial(
                _read_part,
                partial(objects.read, key, size, dtype, base),
                f"{what}, tensor {overlap.name!r}",
                slice((first - at) * dtype.size, (last - at) * dtype.size),
                target,
                first - begin,
            )
        at += count


def _read_part(
    read: Callable[[], Bytes], what: str, part: slice, target: torch.Tensor, start: int
) -> None:
    with named(what):
        data = read()
    write_elements(target, start, data[part])


def _bands(overlap: _Overlap) -> Iterator[_Overlap]:
    """Split an overlap into bands of a few rows; a chunk in two bands is read twice."""
    first, *rest = overlap.start
    rows = max(1, _BAND_BYTES // (overlap.row * overlap.entry.dtype.size))
    for at in range(0, overlap.rows, rows):
        target = overlap.target[at : at + rows]
        yield replace(overlap, start=(first + at, *rest), target=target)


def _decode_across(objects: ChunkStore, overlap: _Overlap, base: str | None, what: str) -> None:
    """Decode complete rows of a piece, then copy the wanted part of each row."""
    rows = torch.empty(
        (overlap.rows, *overlap.piece.shape[1:]), dtype=torch_dtype(overlap.entry.dtype)
    )
    with closing(in_order(lambda job: job(), _jobs(objects, overlap, rows, base, what))) as done:
        for _ in done:
            pass
    sides = zip(overlap.start[1:], overlap.target.shape[1:], strict=True)
    place = (slice(None), *(slice(first, first + size) for first, size in sides))
    part = rows[place]
    write_elements(overlap.target, 0, view_bytes(part.contiguous()))
