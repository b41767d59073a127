"""The codecs: ways to represent one chunk, with or without a reference.

Each codec is a small frozen dataclass with a stable code (``docs/FORMAT.md``, section 5). All are
lossless and deterministic: equal input gives equal bytes, whatever the number of threads.
:func:`encode` picks the smallest representation.

Example::

    code, payload = encode(chunk, reference, dtype)
    assert (decode(code, payload, chunk.size, reference, dtype) == chunk).all()

Whether compiled loops are there: Numba is asked for when they are needed first, not on import.

Without Numba, or with ``MSFT_STORE_NUMBA=0`` in the environment, everything works and gives the
same bytes, more slowly.

Example::

    fast = loops()
    words = rans.encode(symbols, packed) if fast is None else fast.encode(symbols, packed, lanes)
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import zstandard

from msft_store.codec import adaptive_codec, changes, exponent_codec
from msft_store.codec.changes import ChunkChanges, FloatLayout
from msft_store.codec.kernels import (
    Bytes,
    Codes,
    Lanes,
    decode_gaps,
    decode_lane_changes,
    encode_gaps,
    encode_lane_changes,
    join_planes,
    rotate_left,
    rotate_right,
    split_planes,
    view_lanes,
)
from msft_store.errors import VersionError
from msft_store.format.dtypes import DType
from msft_store.format.layout import decompress, get_compressor

NUMBA_VARIABLE = "MSFT_STORE_NUMBA"


@functools.cache
def compiled_kernels() -> Any:
    """Return :mod:`msft_store.codec.numba_kernels`, or ``None``."""
    if os.environ.get(NUMBA_VARIABLE) == "0":
        return None
    try:
        return importlib.import_module("msft_store.codec.numba_kernels")
    except Exception as error:  # Numba fails in many ways where it does not fit its machine
        warnings.warn(
            f"Numba cannot be used ({error}): saves and loads are slower, level small by far",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_DELTA_LEVEL = 1
_PLAIN_LEVEL = 3
_SPARSE_BELOW = 0.4
"""Share of changed elements from which gaps cost more than the zeros that they skip."""
_DENSE_FROM = 0.1
_TABLES_FROM = 8192
"""Bytes of a chunk below which tables take more time than they save space."""
_TABLES_PAY_FROM = 1024
"""Bytes below which a payload may be smaller without tables."""
_SEARCH_FROM = 0.9
"""Share of a chunk's size from which a search for repetitions may find what exponents do not."""
_PLAIN_FROM = 0.6
"""Share of a chunk's size from which a delta may lose against no reference at all."""


Level = Literal["fast", "small"]
"""What an encoder aims for."""
LEVELS: tuple[Level, ...] = ("fast", "small")


_COMPILED_LANES = (2, 4)


class Codec(Protocol):
    """Turns a chunk into a payload and back."""

    @property
    def code(self) -> int:
        """Its number in the byte format."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def needs_reference(self) -> bool:
        """Whether it codes a change."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        """Return the payload of a chunk."""

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        """Return the ``size`` bytes of a chunk; :class:`ValueError` if the payload is damaged."""


@dataclass(frozen=True)
class Raw:
    """The bytes themselves."""

    code: int = 0
    name: str = "raw"
    needs_reference: bool = False

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return chunk.tobytes()

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        if len(payload) != size:
            raise ValueError("a raw chunk has the wrong length")
        return np.frombuffer(payload, np.uint8)


@dataclass(frozen=True)
class Zstd:
    """zstd over the bytes in their order."""

    code: int = 1
    name: str = "zstd"
    needs_reference: bool = False

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return _deflate(chunk, _PLAIN_LEVEL)

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        return _inflate(payload, size)


@dataclass(frozen=True)
class Planes:
    """zstd over byte planes: all lowest bytes first, then the next ones."""

    code: int = 2
    name: str = "planes"
    needs_reference: bool = False

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        codes = view_lanes(chunk, dtype.lane).view(f"<u{dtype.lane}")
        return _deflate(split_planes(codes), _PLAIN_LEVEL)

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        return join_planes(_inflate(payload, size), dtype.lane).view(np.uint8)


@dataclass(frozen=True)
class Same:
    """Equal to the reference: no payload."""

    code: int = 3
    name: str = "same"
    needs_reference: bool = True

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return b""

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        return _required(reference, size)


@dataclass(frozen=True)
class Delta:
    """zstd over the byte planes of every element's change."""

    code: int = 4
    name: str = "delta"
    needs_reference: bool = True

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        return _deflate(split_planes(_change(chunk, reference, dtype)), _DELTA_LEVEL)

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        old = view_lanes(_required(reference, size), dtype.lane)
        change = join_planes(_inflate(payload, size), dtype.lane)
        return decode_lane_changes(change, old, floating=dtype.floating).view(np.uint8)


@dataclass(frozen=True)
class Sparse:
    """zstd over the gaps between changed elements, then over their changes, as byte planes each.

    The payload begins with the number of changed elements (u32).
    """

    code: int = 5
    name: str = "sparse"
    needs_reference: bool = True

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        new, old = (
            view_lanes(chunk, dtype.lane),
            view_lanes(_required(reference, chunk.size), dtype.lane),
        )
        positions = np.flatnonzero(new != old)
        change = encode_lane_changes(new[positions], old[positions], floating=dtype.floating)
        streams = np.concatenate([split_planes(encode_gaps(positions)), split_planes(change)])
        return struct.pack("<I", positions.size) + _deflate(streams, _DELTA_LEVEL)

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        old = view_lanes(_required(reference, size), dtype.lane)
        if len(payload) < 4:
            raise ValueError("a sparse chunk has no count")
        (count,) = struct.unpack_from("<I", payload)
        if count > old.size:
            raise ValueError("a sparse chunk changes more elements than it has")
        streams = _inflate(payload[4:], count * (4 + dtype.lane))
        positions = decode_gaps(join_planes(streams[: 4 * count], 4).astype(np.uint32, copy=False))
        if count and positions[-1] >= old.size:
            raise ValueError("a sparse chunk changes elements beyond its end")
        new: Lanes = old.copy()
        codes = join_planes(streams[4 * count :], dtype.lane)
        new[positions] = decode_lane_changes(codes, old[positions], floating=dtype.floating)
        data: Bytes = new.view(np.uint8)
        return data


@dataclass(frozen=True)
class ExponentClasses:
    """Changes given the exponent of the reference, range-coded; floats of 2 or 4 bytes."""

    code: int = 6
    name: str = "classes"
    needs_reference: bool = True

    def encode(
        self, chunk: Bytes, reference: Bytes | None, dtype: DType, found: ChunkChanges | None = None
    ) -> bytes:
        new, old = (
            view_lanes(chunk, dtype.lane),
            view_lanes(_required(reference, chunk.size), dtype.lane),
        )
        fast = compiled_kernels()
        return exponent_codec.encode(
            found or exponent_codec.find_changes(new, old, _layout(dtype), fast), fast
        )

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        data: Bytes = _required(reference, size).copy()
        self.decode_over(payload, data, dtype)
        return data

    def decode_over(self, payload: bytes, data: Bytes, dtype: DType) -> None:
        """Decode in the place of the reference."""
        exponent_codec.decode_in_place(
            payload, view_lanes(data, dtype.lane), _layout(dtype), compiled_kernels()
        )


@dataclass(frozen=True)
class Adaptive:
    """As exponent_codec, with chances that adapt: smaller and slower."""

    code: int = 7
    name: str = "adaptive"
    needs_reference: bool = True

    def encode(
        self, chunk: Bytes, reference: Bytes | None, dtype: DType, found: ChunkChanges | None = None
    ) -> bytes:
        new, old = (
            view_lanes(chunk, dtype.lane),
            view_lanes(_required(reference, chunk.size), dtype.lane),
        )
        fast, layout = compiled_kernels(), _layout(dtype)
        found = found or exponent_codec.find_changes(new, old, layout, fast)
        return adaptive_codec.encode(old, layout, found, fast)

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        data: Bytes = _required(reference, size).copy()
        self.decode_over(payload, data, dtype)
        return data

    def decode_over(self, payload: bytes, data: Bytes, dtype: DType) -> None:
        """Decode in the place of the reference."""
        adaptive_codec.decode_in_place(
            payload, view_lanes(data, dtype.lane), _layout(dtype), compiled_kernels()
        )


@dataclass(frozen=True)
class Turned:
    """zstd over byte planes of lanes with the sign last: exponents apart from all else.

    For weights that nothing is like: their exponents are all that can be made smaller, so the
    compressor is told to look for little else.
    """

    code: int = 8
    name: str = "turned"
    needs_reference: bool = False

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        codes = view_lanes(chunk, dtype.lane).view(f"<u{dtype.lane}")
        fast = compiled_kernels() if dtype.lane in _COMPILED_LANES else None
        if fast is None:
            planes = split_planes(rotate_left(codes))
        else:
            codes.flags.writeable = False
            planes = fast.split_rotated_planes(codes, dtype.lane)
        stream = get_compressor(None).compressobj(planes.size)
        parts: list[bytes] = []
        for plane in planes.reshape(dtype.lane, -1):
            # A block of its own for each, as a block has one table for all its bytes.
            parts += stream.compress(plane.data), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return b"".join([*parts, stream.flush()])

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        if size % dtype.lane:
            raise ValueError("a turned chunk ends within an element")
        planes = _inflate(payload, size)
        fast = compiled_kernels() if dtype.lane in _COMPILED_LANES else None
        if fast is None:
            return rotate_right(join_planes(planes, dtype.lane)).view(np.uint8)
        codes = np.empty(size // dtype.lane, f"<u{dtype.lane}")
        fast.join_rotated_planes(planes, codes, dtype.lane)
        data: Bytes = codes.view(np.uint8)
        return data


RAW: Codec = Raw()
ZSTD: Codec = Zstd()
PLANES: Codec = Planes()
SAME: Codec = Same()
DELTA: Codec = Delta()
SPARSE: Codec = Sparse()
EXPONENT_CLASSES = ExponentClasses()
ADAPTIVE = Adaptive()
TURNED: Codec = Turned()
_BY_CODE: dict[int, Codec] = {
    codec.code: codec
    for codec in (RAW, ZSTD, PLANES, SAME, DELTA, SPARSE, EXPONENT_CLASSES, ADAPTIVE, TURNED)
}


def codec_by_code(code: int) -> Codec:
    """Return the codec of a format code; :class:`VersionError` if there is none."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise VersionError(f"unknown codec {code}; a newer msft-store may read it") from None


def encode(
    chunk: Bytes,
    reference: Bytes | None,
    dtype: DType,
    *,
    level: Level = "fast",
    found: ChunkChanges | None = None,
) -> tuple[Codec, bytes]:
    """Return the smallest representation of a chunk; ties go to the one that is tried first.

    ``found`` is what changed since the reference, if somebody has looked already.
    """
    best: tuple[Codec, bytes] | None = None
    if reference is not None:
        if np.array_equal(chunk, _required(reference, chunk.size)):
            return SAME, b""
        best = _changed(chunk, reference, dtype, level, found)
        if len(best[1]) < _PLAIN_FROM * chunk.size:
            return best
    plain = _plain(chunk, dtype, level)
    if best is None or len(plain[1]) < len(best[1]):
        best = plain
    return best if len(best[1]) < chunk.size else (RAW, RAW.encode(chunk, None, dtype))


def _plain(chunk: Bytes, dtype: DType, level: Level) -> tuple[Codec, bytes]:
    if dtype.lane == 1:
        return ZSTD, ZSTD.encode(chunk, None, dtype)
    if not dtype.floating:
        return _smallest((PLANES, ZSTD), chunk, None, dtype)
    if level == "small":
        return _smallest((TURNED, PLANES, ZSTD), chunk, None, dtype)
    payload = TURNED.encode(chunk, None, dtype)
    if len(payload) < _SEARCH_FROM * chunk.size:
        return TURNED, payload
    return min((TURNED, payload), _smallest((ZSTD,), chunk, None, dtype), key=lambda p: len(p[1]))


def _changed(
    chunk: Bytes, reference: Bytes, dtype: DType, level: Level, found: ChunkChanges | None
) -> tuple[Codec, bytes]:
    little = chunk.size < _TABLES_FROM
    if changes.float_layout(dtype) is not None and (level == "small" or not little):
        codec = EXPONENT_CLASSES if level == "fast" else ADAPTIVE
        payload = codec.encode(chunk, reference, dtype, found)
        if little or len(payload) < _TABLES_PAY_FROM:
            plainer = _smallest((SPARSE, DELTA) if little else (SPARSE,), chunk, reference, dtype)
            if len(plainer[1]) <= len(payload):
                return plainer
        return codec, payload
    differs = view_lanes(chunk, dtype.lane) != view_lanes(reference, dtype.lane)
    changed = np.count_nonzero(differs) / differs.size
    if changed < _DENSE_FROM:
        return _smallest((SPARSE,), chunk, reference, dtype)
    tried = (SPARSE, DELTA) if changed < _SPARSE_BELOW else (DELTA,)
    return _smallest(tried, chunk, reference, dtype)


def _smallest(
    codecs: tuple[Codec, ...], chunk: Bytes, reference: Bytes | None, dtype: DType
) -> tuple[Codec, bytes]:
    tried = [(codec, codec.encode(chunk, reference, dtype)) for codec in codecs]
    return min(tried, key=lambda pair: len(pair[1]))


def decode(code: int, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
    """Return the ``size`` bytes of a chunk.

    :class:`ValueError` if the payload is damaged, :class:`VersionError` for an unknown codec.
    """
    return codec_by_code(code).decode(payload, size, reference, dtype)


def _change(chunk: Bytes, reference: Bytes | None, dtype: DType) -> Codes:
    old = view_lanes(_required(reference, chunk.size), dtype.lane)
    return encode_lane_changes(view_lanes(chunk, dtype.lane), old, floating=dtype.floating)


def decode_into(code: int, payload: bytes, out: Bytes, dtype: DType) -> None:
    """Fill ``out``, which holds the reference where there is one, with a chunk.

    Errors as :func:`decode`; ``out`` means nothing after one.
    """
    codec = codec_by_code(code)
    if isinstance(codec, ExponentClasses | Adaptive):
        codec.decode_over(payload, out, dtype)
        return
    data = codec.decode(payload, out.size, out if codec.needs_reference else None, dtype)
    if data is not out:
        out[:] = data


def _layout(dtype: DType) -> FloatLayout:
    layout = changes.float_layout(dtype)
    if layout is None:
        raise ValueError(f"{dtype.name} has no classes")
    return layout


def _required(reference: Bytes | None, size: int) -> Bytes:
    if reference is None or reference.size != size:
        raise ValueError("the reference has the wrong length")
    return reference


def _deflate(data: Bytes, level: int) -> bytes:
    return get_compressor(level).compress(data.data)


def _inflate(payload: bytes, size: int) -> Bytes:
    return np.frombuffer(decompress(payload, size), np.uint8)
