"""Read elements of a base's tensors, or of boxes of them.

Elements are rounded to the requested dtype, so that a float32 model on disk can be the base of a
bfloat16 run. The user may move or change the files of a base at any time. Invariant: callers that
verify a span get a :class:`BaseError` for changed files, never wrong bytes.

Example::

    reader = BaseReader(backend, base)
    reader.read_span(BaseSpan(tensor="lm_head.weight", start=0), 4096, by_name("bfloat16"))
"""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msft_store.codec.kernels import Bytes
from msft_store.errors import (
    BaseError,
    CorruptedError,
    MismatchError,
    StorageError,
    StoreError,
    is_damage,
)
from msft_store.format.dtypes import DType
from msft_store.format.key_table import Keys, KeyTable, view_keys
from msft_store.format.layout import CHUNK_BYTES, BaseSpan, ViewSpan, chunk_key
from msft_store.format.mapping import Shape, ViewPart
from msft_store.objects.bases import (
    Base,
    BaseTensor,
    Stamp,
    base_path,
    file_stamp,
    last_seen,
    read_base,
    seen_chunks,
)
from msft_store.storage.backend import Backend, read_file_into, read_small_file

_READ_COST = 1 << 14
"""Bytes that take as long to read as the start of one more read."""
_MAX_SAMPLE = 1 << 18
"""Largest number of elements that are read for a sample besides its own."""
_MAX_GAPS = 1 << 24
"""Largest number of bytes that are read at once with gaps."""
_ROUNDED = 1 << 18
"""Largest number of elements that are read at once to be rounded."""
_LOG = logging.getLogger(__name__)
_WARNED: set[str] = set()
"""Ids of the bases that this process has already warned of."""


class BaseReader:
    """Reads the bytes of a base by span; the caller must verify them, as files may have changed."""

    def __init__(self, backend: Backend, base: Base) -> None:
        self.base = base
        self._backend = backend
        self.chunks = {
            key: BaseSpan(tensor=name, start=number * CHUNK_BYTES // tensor.dtype.size)
            for name, tensor in base.tensors.items()
            for number, key in enumerate(tensor.keys)
        }
        self._record = backend.describe(base_path(base.id))
        self._unmoved = b""

    @cached_property
    def _table(self) -> KeyTable:
        keys = view_keys(b"".join(self.chunks))
        return KeyTable(keys, np.arange(len(keys)))

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Return a mask of the keys whose chunks are in the base."""
        return self._table.contains(keys)

    def holds(self, key: bytes, scratch: Bytes) -> bool:
        """Return True if a file of the base has a recorded chunk now.

        A chunk is read once in a process, and again when the file has changed since.
        """
        span = self.chunks[key]
        tensor, size = self._tensor(span.tensor), self.chunk_bytes(span)
        path = self.base.files[tensor.file][0]
        place = _place(tensor, span.start * tensor.dtype.size // CHUNK_BYTES)
        stamp = file_stamp(path)
        known = None if stamp is None else seen_chunks(path, stamp).get(place)
        if known is None:
            known = self._compare(span, key, scratch[:size])
            if stamp is not None:
                seen_chunks(path, stamp)[place] = known
        return known

    def _compare(self, span: BaseSpan, key: bytes, out: Bytes) -> bool:
        try:
            self.read_span_into(span, out, self._tensor(span.tensor).dtype)
            self.verify(span.tensor, out, key)
        except StoreError as error:
            self.warn_of(error)
            return False
        return True

    def warn_of(self, error: StoreError) -> None:
        """Warn, once in a process, that the base changed; raise any other error."""
        if not (isinstance(error, BaseError) or is_damage(error)):
            raise error
        if self.base.id not in _WARNED:
            _WARNED.add(self.base.id)
            _LOG.warning("%s. Until then, saves store whole all that needs it", error)

    def stamp(self) -> tuple[Stamp, ...] | None:
        """Return the stamps of all files; ``None`` if one of them has none."""
        stamps = tuple(file_stamp(path) for path, _ in self.base.files)
        known = tuple(stamp for stamp in stamps if stamp is not None)
        return known if len(known) == len(stamps) else None

    def chunk_bytes(self, span: BaseSpan) -> int:
        """Return the size in bytes of the chunk that begins at a span's first element."""
        tensor = self._tensor(span.tensor)
        return min(CHUNK_BYTES, tensor.nbytes - span.start * tensor.dtype.size)

    def verify_span(self, span: BaseSpan, count: int) -> None:
        """Verify all chunks that a span overlaps; :class:`BaseError` if one changed."""
        tensor = self._tensor(span.tensor)
        step = CHUNK_BYTES // tensor.dtype.size
        touched: set[int] = set()
        for start, length in self._runs(span, count):
            touched.update(range(start // step, -(-(start + length) // step)))
        for number in sorted(touched):
            chunk = BaseSpan(tensor=span.tensor, start=number * step)
            size = self.chunk_bytes(chunk) // tensor.dtype.size
            data = self.read_span(chunk, size, tensor.dtype)
            self.verify(span.tensor, data, tensor.keys[number])

    def verify(self, name: str, data: Bytes, key: bytes) -> None:
        """Verify a chunk of a tensor against its key; :class:`BaseError` if it changed."""
        tensor = self._tensor(name)
        if chunk_key(data.data, tensor.dtype) != key:
            raise self._changed(name)

    def _changed(self, name: str) -> BaseError:
        file = self.base.files[self._tensor(name).file][0]
        return BaseError(
            f"{file} changed since it was added as base {self.base.id[:12]} (tensor {name!r}); "
            "put the original file back",
            file=file,
        )

    def read_span(self, span: BaseSpan, count: int, dtype: DType) -> Bytes:
        """Return the bytes of ``count`` elements, converted to ``dtype``."""
        out: Bytes = np.empty(count * dtype.size, np.uint8)
        self.read_span_into(span, out, dtype)
        return out

    def read_span_into(self, span: BaseSpan, out: Bytes, dtype: DType) -> None:
        """Fill ``out`` with the bytes of elements, converted to ``dtype``."""
        tensor = self._tensor(span.tensor)
        same, width = tensor.dtype == dtype, tensor.dtype.size
        count = out.size // dtype.size
        # Elements of another type are rounded while they are in the processor's cache.
        step = count if same else min(count, _ROUNDED)
        scratch = out if same else np.empty(step * width, np.uint8)
        filled = 0
        for first, length in self._runs(span, count):
            for start in range(first, first + length, step):
                some = min(step, first + length - start)
                part = out[filled * dtype.size : (filled + some) * dtype.size]
                raw = part if same else scratch[: some * width]
                self._fill(span.tensor, start, raw)
                if not same:
                    part[:] = _convert(raw, tensor.dtype, dtype)
                filled += some
        if filled != count:
            raise self._too_short(tensor)

    def read_verified_into(self, span: BaseSpan, out: Bytes, dtype: DType) -> bytes:
        """Fill ``out`` from verified chunks; return the key of the result.

        :class:`BaseError` if the base changed. Encoders must use this method: a difference from
        unnoticed changed bytes could never be decoded again. A chunk is hashed once in a process,
        and again when the file has changed since.
        """
        tensor, count = self._tensor(span.tensor), out.size // dtype.size
        number, rest = divmod(span.start * dtype.size, CHUNK_BYTES)
        if span.box is None and tensor.dtype == dtype and not rest:
            # By far the most references are one chunk.
            size = min(CHUNK_BYTES, tensor.nbytes - number * CHUNK_BYTES)
            if size == out.size and self._read_seen(span, range(number, number + 1), out, dtype):
                return tensor.keys[number]
        runs = list(self._runs(span, count))
        if len(runs) != 1:
            self.verify_span(span, count)
            self.read_span_into(span, out, dtype)
            return chunk_key(out.data, dtype)
        (start, length), step = runs[0], CHUNK_BYTES // tensor.dtype.size
        numbers = range(start // step, -(-(start + length) // step))
        begin = numbers.start * step
        end = min(numbers.stop * step, tensor.nbytes // tensor.dtype.size)
        whole = tensor.dtype == dtype and (begin, end) == (start, start + length)
        if not self._read_seen(span, numbers, out, dtype):
            # Read straight into the result if it consists of whole chunks of the same dtype.
            raw = out if whole else np.empty((end - begin) * tensor.dtype.size, np.uint8)
            self._read_chunks(span.tensor, numbers, raw)
            if not whole:
                at = (start - begin) * tensor.dtype.size
                out[:] = _convert(raw[at : at + length * tensor.dtype.size], tensor.dtype, dtype)
        return (
            tensor.keys[begin // step]
            if whole and len(numbers) == 1
            else chunk_key(out.data, dtype)
        )

    def _read_seen(self, span: BaseSpan, numbers: range, out: Bytes, dtype: DType) -> bool:
        """Fill ``out``; return True if all the chunks that it is in are proven to be as recorded.

        They were hashed before, and after the bytes are read the file is the same as it was then.
        """
        tensor = self._tensor(span.tensor)
        path = self.base.files[tensor.file][0]
        stamp, seen = last_seen(path)
        if not all(seen.get(_place(tensor, number)) for number in numbers):
            return False
        self.read_span_into(span, out, dtype)
        return file_stamp(path) == stamp

    def _read_chunks(self, name: str, numbers: range, out: Bytes) -> None:
        """Fill ``out`` with consecutive chunks of a tensor; :class:`BaseError` if one changed."""
        tensor = self._tensor(name)
        path = self.base.files[tensor.file][0]
        stamp = file_stamp(path)
        self._fill(name, numbers.start * CHUNK_BYTES // tensor.dtype.size, out)
        for at, number in enumerate(numbers):
            self.verify(name, out[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES], tensor.keys[number])
        if stamp is not None and file_stamp(path) == stamp:
            seen_chunks(path, stamp).update((_place(tensor, number), True) for number in numbers)

    def read_view_into(
        self, span: ViewSpan, out: Bytes, dtype: DType, *, verified: bool = False
    ) -> None:
        """Fill ``out`` with the bytes of elements of a view, converted to ``dtype``.

        With ``verified`` all chunks that they are in are verified first, those that were seen
        before by the stamp of their file; :class:`BaseError` if one changed.
        """
        view = span.view
        offset, shape = span.box or ((0,) * len(view.shape), view.shape)
        _check_box(view.shape, offset, shape, span.start, out.size // dtype.size)
        values, at = out.view(_words(dtype)), 0
        for inner, size in range_boxes(shape, span.start, values.size):
            first = tuple(map(operator.add, offset, inner))
            here = values[at : at + math.prod(size)].reshape(size)
            here[...] = 0
            for part, begin, shared in view.overlapping(first, size):
                box = self._read_part(part, begin, shared, dtype, verified=verified)
                place = zip(begin, first, shared, strict=True)
                here[tuple(slice(b - f, b - f + n) for b, f, n in place)] = box
            at += here.size

    def _read_part(
        self, part: ViewPart, begin: Shape, shape: Shape, dtype: DType, *, verified: bool
    ) -> NDArray[Any]:
        """Return the box of a view that begins at ``begin``, inside one part."""
        tensor = self._tensor(part.tensor)
        try:
            dims = part.check(tensor.shape)
        except ValueError as error:
            raise CorruptedError(f"a view does not fit {self._record}: {error}") from None
        first, size = part.in_base(tuple(map(operator.sub, begin, part.offset)), shape)
        if verified:
            self._require_box(part.tensor, dims, first, size)
        box = np.empty(size, _words(tensor.dtype))
        self._read_box(part.tensor, dims, first, box)
        data = _convert(box.reshape(-1).view(np.uint8), tensor.dtype, dtype)
        found: NDArray[Any] = data.view(_words(dtype)).reshape(size)
        return (found if part.axes is None else found.transpose(part.axes)).reshape(shape)

    def _require_box(self, name: str, dims: Shape, first: Shape, size: Shape) -> None:
        """Raise :class:`BaseError` if a chunk that holds elements of a box changed."""
        tensor, step = self._tensor(name), CHUNK_BYTES // self._tensor(name).dtype.size
        begin, count = _extent(dims, first, size)
        scratch: Bytes = np.empty(min(CHUNK_BYTES, tensor.nbytes), np.uint8)
        for key in tensor.keys[begin // step : -(-(begin + count) // step)]:
            if not self.holds(key, scratch):
                raise self._changed(name)

    def _read_box(self, name: str, dims: Shape, first: Shape, out: NDArray[Any]) -> None:
        """Fill ``out`` with a box of a tensor that is read with the shape ``dims``.

        A box with gaps is read with its gaps, if they are small, and else by halves.
        """
        begin, count = _extent(dims, first, out.shape)
        if count == out.size:
            self._fill(name, begin, out.reshape(-1).view(np.uint8))
            return
        runs = out.size // max(_run(dims, out.shape), 1)
        if count * out.itemsize <= min(out.nbytes + runs * _READ_COST, _MAX_GAPS):
            covering = np.empty(count, out.dtype)
            self._fill(name, begin, covering.view(np.uint8))
            strides = [math.prod(dims[axis + 1 :]) * out.itemsize for axis in range(len(dims))]
            out[...] = np.lib.stride_tricks.as_strided(covering, out.shape, strides)
            return
        axis = next(axis for axis, length in enumerate(out.shape) if length > 1)
        half = out.shape[axis] // 2
        other = tuple(at + half if n == axis else at for n, at in enumerate(first))
        before, after = np.split(out, [half], axis)
        self._read_box(name, dims, first, before)
        self._read_box(name, dims, other, after)

    def sample(self, name: str, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return elements of a tensor by their row-major indices; NaN if the base changed."""
        tensor = self._tensor(name)
        found = np.full(len(index), np.nan)
        if tensor.dtype.torch is None or tensor.dtype.torch.is_complex or not len(index):
            return found
        try:
            parts = []
            far = np.flatnonzero(np.abs(np.diff(index)) > _MAX_SAMPLE // len(index)) + 1
            for run in np.split(index, far):
                first = int(run.min())
                covering = np.empty(int(run.max()) + 1 - first, _words(tensor.dtype))
                self._fill(name, first, covering.view(np.uint8))
                parts.append(covering[run - first])
            data: Bytes = np.concatenate(parts).view(np.uint8)
        except StoreError as error:
            self.warn_of(error)
            return found
        values: NDArray[np.float64] = (
            torch.from_numpy(data).view(tensor.dtype.torch).double().numpy()
        )
        return values

    def _runs(self, span: BaseSpan, count: int) -> Iterator[tuple[int, int]]:
        tensor = self._tensor(span.tensor)
        if span.box is None:
            rest = tensor.nbytes // tensor.dtype.size - span.start
            return iter([(span.start, min(count, rest))] if min(count, rest) > 0 else [])
        return box_runs(tensor.shape, *span.box, span.start, count)

    def _fill(self, name: str, start: int, out: Bytes) -> None:
        base = self.base
        tensor = base.tensors[name]
        path, _ = base.files[tensor.file]
        try:
            got = read_file_into(path, tensor.offset + start * tensor.dtype.size, out.data)
        except StorageError as error:
            if os.path.isfile(path):
                raise
            # Another process may have recorded a new path since this record was read.
            record = read_small_file(self._backend, base_path(base.id))
            if record != self._unmoved:
                self.base = read_base(self._backend, base.id)
                if self.base.files != base.files:
                    self._fill(name, start, out)
                    return
                self._unmoved = record
            raise BaseError(
                f"base {self.base.id[:12]} is no longer at {path}; "
                f"if it moved: msft-store relocate {self.base.id[:12]} NEW_PATH",
                file=path,
            ) from error
        if got != out.size:
            raise self._too_short(tensor)

    def _too_short(self, tensor: BaseTensor) -> BaseError:
        return BaseError(
            f"{self.base.files[tensor.file][0]} is shorter than when it was added as base "
            f"{self.base.id[:12]}; put the original file back or use relocate",
            file=self.base.files[tensor.file][0],
        )

    def _tensor(self, name: str) -> BaseTensor:
        try:
            return self.base.tensors[name]
        except KeyError:
            raise CorruptedError(f"{self._record} has no tensor {name!r}") from None


def _place(tensor: BaseTensor, number: int) -> tuple[int, bytes]:
    """Return the offset and the key of a chunk, by which :func:`seen_chunks` knows it."""
    return tensor.offset + number * CHUNK_BYTES, tensor.keys[number]


def box_runs(
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    box: tuple[int, ...],
    start: int,
    count: int,
) -> Iterator[tuple[int, int]]:
    """Yield the contiguous runs of a row-major tensor that make up part of a box.

    The part is ``count`` elements from element ``start`` of the box. A run is its first element's
    index in the tensor and its number of elements.
    """
    _check_box(shape, offset, box)
    split = len(shape)
    while split > 0 and box[split:] == shape[split:]:
        split -= 1
    # Dimensions from `split` on are contiguous in the tensor.
    run = math.prod(box[split:])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    end = min(start + count, math.prod(box))
    while start < end:
        row, within = divmod(start, run)
        length = min(run - within, end - start)
        position = within + sum(o * s for o, s in zip(offset, strides, strict=True))
        for axis in reversed(range(split)):
            row, index = divmod(row, box[axis])
            position += index * strides[axis]
        yield position, length
        start += length


def range_boxes(shape: Shape, start: int, count: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield the boxes, in order, that ``count`` elements from ``start`` on of a tensor make up."""
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    while count:
        row, within = divmod(start, inner)
        length = count - count % inner if within == 0 else 0
        if length:
            yield (row, *(0 for _ in shape[1:])), (length // inner, *shape[1:])
        else:
            length = min(inner - within, count)
            for offset, size in range_boxes(shape[1:], within, length):
                yield (row, *offset), (1, *size)
        start, count = start + length, count - length


def _check_box(shape: Shape, offset: Shape, box: Shape, start: int = 0, count: int = 0) -> None:
    if len(offset) != len(shape) or any(
        o + n > s for o, n, s in zip(offset, box, shape, strict=True)
    ):
        raise MismatchError(f"the box {offset} + {box} lies outside the shape {shape}")
    if start + count > math.prod(box):
        raise MismatchError(f"{count} elements from {start} on lie outside the box {box}")


def _extent(dims: Shape, first: Shape, size: Shape) -> tuple[int, int]:
    """Return the index of a box's first element, and the number of elements up to its last one."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    begin = sum(map(operator.mul, first, strides))
    return begin, sum((n - 1) * s for n, s in zip(size, strides, strict=True)) + 1


def _run(dims: Shape, size: Shape) -> int:
    """Return the number of elements in a row that are contiguous in a box."""
    run, axis = 1, len(dims)
    while axis:
        axis -= 1
        run *= size[axis]
        if size[axis] != dims[axis]:
            break
    return run


def _words(dtype: DType) -> np.dtype[Any]:
    """Return the type of numpy that copies an element as one word."""
    return np.dtype("c16" if dtype.size == 16 else f"u{dtype.size}")


def can_convert(have: DType, want: DType) -> bool:
    """Return True if base elements of one dtype can be references for another dtype."""
    return have == want or (_rounds(have) and _rounds(want))


def _rounds(dtype: DType) -> bool:
    return dtype.floating and dtype.size == dtype.lane > 1


def _convert(data: Bytes, have: DType, want: DType) -> Bytes:
    if have == want:
        return data
    if have.torch is None or want.torch is None or not can_convert(have, want):
        raise MismatchError(f"{have.name} is not converted to {want.name}")
    rounded = torch.from_numpy(data).view(have.torch).to(want.torch)
    converted: Bytes = rounded.view(torch.uint8).numpy()
    nan = rounded.isnan()
    if nan.any():
        # Replace NaN, because the bits of a converted NaN depend on the processor.
        converted.reshape(-1, want.size)[nan.numpy()] = 0
    return converted
