"""The codecs: ways to represent one chunk, with or without a reference.

Each codec is a small frozen dataclass with a stable code (``docs/FORMAT.md``, section 5). All are
lossless and deterministic: equal input gives equal bytes, whatever the number of threads and with
or without the kernels that Numba compiles. Without Numba, with ``MSFT_STORE_NUMBA=0`` in the
environment, and until the kernels are compiled, everything works more slowly. :func:`encode` picks
the smallest representation.

Example::

    codec, payload = encode(chunk, reference, dtype)
    codec.decode_into(payload, reference, dtype)              # reference is now equal to chunk
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from msft_store.codec import adaptive_codec, changes, compact_codec, exponent_codec, kernels
from msft_store.codec.changes import ChunkChanges, FloatLayout
from msft_store.codec.compilation import compiled_kernels
from msft_store.codec.kernels import (
    Bytes,
    Lanes,
    decode_gaps,
    decode_lane_changes,
    encode_gaps,
    encode_lane_changes,
    join_planes,
    split_planes,
    view_lanes,
)
from msft_store.codec.undo import Undo, compare, make_undo
from msft_store.errors import VersionError
from msft_store.format.dtypes import DType
from msft_store.format.layout import decompress, get_compressor

_DELTA_LEVEL = 1
_PLAIN_LEVEL = 3
_SPARSE_BELOW = 0.4
"""From this share of changed elements on, gaps cost more than the zeros that they replace."""
_DENSE_FROM = 0.1
_TABLES_FROM = 512
"""Chunks of fewer bytes are coded without tables, which would not be worth their time."""
_SMALL_BELOW = 8192
"""Chunks of fewer bytes may be smaller without tables, however many elements change."""
_TABLES_PAY_FROM = 1024
"""Payloads of fewer bytes may be smaller without tables."""
_SEARCH_FROM = 0.9
"""From this share of a chunk's size on, zstd may find repetitions that save more than exponents."""
_PLAIN_FROM = 0.6
"""From this share of a chunk's size on, coding without a reference may be smaller than a delta."""


_COMPILED_LANES = (2, 4)
"""Widths of the lanes that the compiled kernels can rotate, bytes."""


@dataclass(frozen=True)
class Codec(ABC):
    """Turns a chunk into a payload and back."""

    code: int
    """The number of the codec in the byte format."""
    name: str
    """The name of the codec in messages."""
    needs_reference: bool = False
    """True if the codec codes a change against a reference."""

    @abstractmethod
    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        """Return the payload of a chunk."""

    @abstractmethod
    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        """Replace the reference in ``out``, if there is one, by the decoded chunk.

        :class:`ValueError` if the payload is damaged; ``out`` is then undefined.
        """

    def decode_with_undo(self, payload: bytes, out: Bytes, dtype: DType) -> Undo:
        """Do what :meth:`decode_into` does; return the way back to the reference."""
        before = out.copy()
        self.decode_into(payload, out, dtype)
        return compare(before, out, dtype.lane)

    def restores(
        self, payload: bytes, chunk: Bytes, out: Bytes, dtype: DType, found: ChunkChanges | None
    ) -> bool:
        """Return True if a payload decodes to the chunk; ``out`` is as for :meth:`decode_into`.

        ``found`` holds the changes of the chunk if they are known. As they come from a comparison
        of all elements, a codec may compare what a payload changes with them.
        """
        try:
            self.decode_into(payload, out, dtype)
        except ValueError:
            return False
        return _are_equal(out, chunk)


class Raw(Codec):
    """The plain bytes of the chunk."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return chunk.tobytes()

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        if len(payload) != out.size:
            raise ValueError("a raw chunk has the wrong length")
        out[:] = np.frombuffer(payload, np.uint8)


class Zstd(Codec):
    """A zstd frame of the bytes."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return _compress(chunk, _PLAIN_LEVEL)

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        out[:] = _decompress(payload, out.size)


class Planes(Codec):
    """A zstd frame of byte planes: all lowest bytes, then all second bytes, and so on."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        codes = view_lanes(chunk, dtype.lane).view(f"<u{dtype.lane}")
        return _compress(split_planes(codes), _PLAIN_LEVEL)

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        out[:] = join_planes(_decompress(payload, out.size), dtype.lane).view(np.uint8)


class Same(Codec):
    """An empty payload: the chunk equals the reference."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return b""

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        pass


class Delta(Codec):
    """A zstd frame of the byte planes of all changes."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        new, old = _view_pair(chunk, reference, dtype)
        change = encode_lane_changes(new, old, floating=dtype.floating)
        return _compress(split_planes(change), _DELTA_LEVEL)

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        lanes = view_lanes(out, dtype.lane)
        change = join_planes(_decompress(payload, out.size), dtype.lane)
        lanes[:] = decode_lane_changes(change, lanes, floating=dtype.floating)


class Sparse(Codec):
    """The number of changed elements (u32), then a zstd frame of planes of gaps and of changes."""

    def encode(
        self, chunk: Bytes, reference: Bytes | None, dtype: DType, found: ChunkChanges | None = None
    ) -> bytes:
        new, old = _view_pair(chunk, reference, dtype)
        listed = None if found is None else found.listed
        if listed is None:
            positions = np.flatnonzero(new != old)
        else:
            positions = listed.positions[listed.references != listed.values].astype(np.int64)
        change = encode_lane_changes(new[positions], old[positions], floating=dtype.floating)
        streams = np.concatenate([split_planes(encode_gaps(positions)), split_planes(change)])
        return struct.pack("<I", positions.size) + _compress(streams, _DELTA_LEVEL)

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        lanes = view_lanes(out, dtype.lane)
        if len(payload) < 4:
            raise ValueError("a sparse chunk has no count")
        (count,) = struct.unpack_from("<I", payload)
        if count > lanes.size:
            raise ValueError("a sparse chunk changes more elements than it has")
        streams = _decompress(payload[4:], count * (4 + dtype.lane))
        positions = decode_gaps(join_planes(streams[: 4 * count], 4).astype(np.uint32, copy=False))
        if count and positions[-1] >= lanes.size:
            raise ValueError("a sparse chunk changes elements beyond its end")
        codes = join_planes(streams[4 * count :], dtype.lane)
        lanes[positions] = decode_lane_changes(codes, lanes[positions], floating=dtype.floating)


class Compact(Codec):
    """Changes range-coded by the exponent of the reference, for floats of 2 or 4 bytes."""

    def encode(
        self, chunk: Bytes, reference: Bytes | None, dtype: DType, found: ChunkChanges | None = None
    ) -> bytes:
        new, old = _view_pair(chunk, reference, dtype)
        compiled, layout = compiled_kernels(dtype.lane), _require_layout(dtype)
        found = found or exponent_codec.find_changes(new, old, layout, compiled)
        return compact_codec.encode(found, layout, compiled)

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        lanes, layout = view_lanes(out, dtype.lane), _require_layout(dtype)
        compact_codec.decode_in_place(payload, lanes, layout, compiled_kernels(dtype.lane))

    def decode_with_undo(self, payload: bytes, out: Bytes, dtype: DType) -> Undo:
        lanes, layout = view_lanes(out, dtype.lane), _require_layout(dtype)
        compiled = compiled_kernels(dtype.lane)
        listed = compact_codec.decode_in_place(payload, lanes, layout, compiled, keep=True)
        return make_undo(*listed, out)

    def restores(
        self, payload: bytes, chunk: Bytes, out: Bytes, dtype: DType, found: ChunkChanges | None
    ) -> bool:
        compiled = compiled_kernels(dtype.lane)
        if found is None or found.listed is None or compiled is None:
            return super().restores(payload, chunk, out, dtype, found)
        size, layout = chunk.size // dtype.lane, _require_layout(dtype)
        return compact_codec.restores(payload, size, found, layout, compiled)


class _ReadOnly(Codec):
    """A codec of older stores, which is read for ever and not written."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        raise NotImplementedError(f"the codec {self.name} is only read; {COMPACT.name} replaces it")


class ExponentClasses(_ReadOnly):
    """The changes of codec 9 with larger tables, and without values for references of zero."""

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        lanes, layout = view_lanes(out, dtype.lane), _require_layout(dtype)
        exponent_codec.decode_in_place(payload, lanes, layout, compiled_kernels(dtype.lane))


class Adaptive(_ReadOnly):
    """The changes of codec 6, coded with adaptive probabilities: slow."""

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        lanes, layout = view_lanes(out, dtype.lane), _require_layout(dtype)
        # To wait until the loops are compiled takes less time than to work without them.
        adaptive_codec.decode_in_place(
            payload, lanes, layout, compiled_kernels(dtype.lane, wait=True)
        )


class Turned(Codec):
    """A zstd frame of the byte planes of lanes rotated left by one bit, which isolates exponents.

    It suits weights that resemble no reference. Only their exponents can be compressed, so zstd
    hardly searches for matches.
    """

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        codes = view_lanes(chunk, dtype.lane).view(f"<u{dtype.lane}")
        codes.flags.writeable = False
        planes = _rotation_kernels(dtype).split_rotated_planes(codes, dtype.lane)
        stream = get_compressor(None).compressobj(planes.size)
        parts: list[bytes] = []
        for plane in planes.reshape(dtype.lane, -1):
            # Each plane gets its own zstd block, because a block has one entropy table.
            parts += stream.compress(plane.data), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return b"".join([*parts, stream.flush()])

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        codes = view_lanes(out, dtype.lane).view(f"<u{dtype.lane}")
        planes = _decompress(payload, out.size)
        _rotation_kernels(dtype).join_rotated_planes(planes, codes, dtype.lane)


RAW = Raw(0, "raw")
ZSTD = Zstd(1, "zstd")
PLANES = Planes(2, "planes")
SAME = Same(3, "same", needs_reference=True)
DELTA = Delta(4, "delta", needs_reference=True)
SPARSE = Sparse(5, "sparse", needs_reference=True)
EXPONENT_CLASSES = ExponentClasses(6, "classes", needs_reference=True)
ADAPTIVE = Adaptive(7, "adaptive", needs_reference=True)
TURNED = Turned(8, "turned")
COMPACT = Compact(9, "compact", needs_reference=True)
_BY_CODE: dict[int, Codec] = {
    codec.code: codec
    for codec in [
        RAW,
        ZSTD,
        PLANES,
        SAME,
        DELTA,
        SPARSE,
        EXPONENT_CLASSES,
        ADAPTIVE,
        TURNED,
        COMPACT,
    ]
}


def codec_by_code(code: int) -> Codec:
    """Return the codec of a code; :class:`VersionError` if the code is unknown."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise VersionError(f"unknown codec {code}; a newer msft-store may read it") from None


def find_changes(chunk: Bytes, reference: Bytes, dtype: DType) -> ChunkChanges | None:
    """Return the changes of a chunk; ``None`` if the codecs of its type have no use for them."""
    layout = changes.float_layout(dtype)
    if layout is None or chunk.size < _TABLES_FROM:
        return None
    new, old = _view_pair(chunk, reference, dtype)
    return exponent_codec.find_changes(new, old, layout, compiled_kernels(dtype.lane))


def encode(
    chunk: Bytes,
    reference: Bytes | None,
    dtype: DType,
    *,
    found: ChunkChanges | None = None,
) -> tuple[Codec, bytes]:
    """Return the smallest representation of a chunk; the codec tried first wins a tie.

    ``found`` holds the changes against the reference if they are known already.
    """
    tried: list[tuple[Codec, bytes]] = []
    if reference is not None:
        if found is None and _are_equal(chunk, reference):
            return SAME, b""
        tried.append(_encode_against(chunk, reference, dtype, found))
        if len(tried[0][1]) < _PLAIN_FROM * chunk.size:
            return tried[0]
    best = _smallest(*tried, _encode_alone(chunk, dtype))
    return best if len(best[1]) < chunk.size else (RAW, RAW.encode(chunk, None, dtype))


def _encode_alone(chunk: Bytes, dtype: DType) -> tuple[Codec, bytes]:
    if dtype.lane == 1:
        return ZSTD, ZSTD.encode(chunk, None, dtype)
    if not dtype.floating:
        return _encode_smallest((PLANES, ZSTD), chunk, None, dtype)
    turned = TURNED.encode(chunk, None, dtype)
    if len(turned) < _SEARCH_FROM * chunk.size:
        return TURNED, turned
    return _smallest((TURNED, turned), (ZSTD, ZSTD.encode(chunk, None, dtype)))


def _encode_against(
    chunk: Bytes, reference: Bytes, dtype: DType, found: ChunkChanges | None
) -> tuple[Codec, bytes]:
    is_small = chunk.size < _SMALL_BELOW
    if changes.float_layout(dtype) is not None and chunk.size >= _TABLES_FROM:
        payload = COMPACT.encode(chunk, reference, dtype, found)
        if not is_small and len(payload) >= _TABLES_PAY_FROM:
            return COMPACT, payload
        tried: list[tuple[Codec, bytes]] = [(SPARSE, SPARSE.encode(chunk, reference, dtype, found))]
        if is_small:
            tried.append((DELTA, DELTA.encode(chunk, reference, dtype)))
        return _smallest(*tried, (COMPACT, payload))
    new, old = _view_pair(chunk, reference, dtype)
    changed = np.count_nonzero(new != old) / new.size
    sparse = (SPARSE,) if changed < _SPARSE_BELOW else ()
    dense = (DELTA,) if changed >= _DENSE_FROM else ()
    return _encode_smallest((*sparse, *dense), chunk, reference, dtype)


def _encode_smallest(
    codecs: tuple[Codec, ...], chunk: Bytes, reference: Bytes | None, dtype: DType
) -> tuple[Codec, bytes]:
    return _smallest(*((codec, codec.encode(chunk, reference, dtype)) for codec in codecs))


def _smallest(*tried: tuple[Codec, bytes]) -> tuple[Codec, bytes]:
    return min(tried, key=lambda pair: len(pair[1]))


def _are_equal(one: Bytes, other: Bytes) -> bool:
    # Comparing words of eight bytes is faster; the remaining bytes are compared separately.
    words = one.size & ~7
    return (
        one.size == other.size
        and np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64))
        and np.array_equal(one[words:], other[words:])
    )


def _require_layout(dtype: DType) -> FloatLayout:
    layout = changes.float_layout(dtype)
    if layout is None:
        raise ValueError(f"{dtype.name} has no exponents to code by")
    return layout


def _rotation_kernels(dtype: DType) -> Any:
    compiled = compiled_kernels(dtype.lane) if dtype.lane in _COMPILED_LANES else None
    return kernels if compiled is None else compiled


def _view_pair(chunk: Bytes, reference: Bytes | None, dtype: DType) -> tuple[Lanes, Lanes]:
    if reference is None or reference.size != chunk.size:
        raise ValueError("the reference has the wrong length")
    return view_lanes(chunk, dtype.lane), view_lanes(reference, dtype.lane)


def _compress(data: Bytes, level: int) -> bytes:
    return get_compressor(level).compress(data.data)


def _decompress(payload: bytes, size: int) -> Bytes:
    return np.frombuffer(decompress(payload, size), np.uint8)
