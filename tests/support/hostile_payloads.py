"""Hostile payloads: changed inside their frames, with counts that fit or nearly fit.

Run as a program, it decodes as many as it is told: with ``NUMBA_BOUNDSCHECK=1`` in the environment,
an index out of bounds in a compiled loop is an error.

Example::

    python -m tests.support.hostile_payloads 10000 7
"""

from __future__ import annotations

import struct
import sys

import numpy as np
import zstandard

from msft_store import StoreError
from msft_store.codec import compact_codec
from msft_store.codec.changes import float_layout
from msft_store.codec.codecs import (
    ADAPTIVE,
    COMPACT,
    DELTA,
    EXPONENT_CLASSES,
    PLANES,
    RAW,
    SAME,
    SPARSE,
    TURNED,
    ZSTD,
    Codec,
)
from msft_store.format.dtypes import DTYPES, DType
from tests.support.pairs import encode_with, restore

PLAIN: list[Codec] = [RAW, ZSTD, PLANES, SAME, DELTA, SPARSE, TURNED]
BY_CLASS: list[Codec] = [EXPONENT_CLASSES, ADAPTIVE, COMPACT]
CODECS = PLAIN + BY_CLASS
_HEADER = struct.Struct("<5IBBH")
_ODD = [0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1]


def attack(rng: np.random.Generator) -> None:
    """Decode one hostile payload; anything but bytes of the right size or a refusal is raised."""
    codec = CODECS[rng.integers(len(CODECS))]
    by_class = codec in BY_CLASS
    known = [d for d in DTYPES if not by_class or float_layout(d) is not None]
    dtype = known[rng.integers(len(known))]
    chunk, reference = _pair(dtype, int(rng.integers(1, 1500)), rng)
    payload = spoiled(codec, encode_with(codec, chunk, reference, dtype), rng)
    size = chunk.size
    if rng.random() < 0.1:
        size = max(1, size + int(rng.integers(-9, 9)))
        reference = np.resize(reference, size)
    try:
        data = restore(codec, payload, size, reference, dtype)
    except (ValueError, StoreError):
        return
    assert data.size == size


def _pair(dtype: DType, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a chunk and its reference: weights of few exponents, or any bits."""
    lanes = count * dtype.size // dtype.lane
    if rng.random() < 0.5 and dtype.floating and dtype.lane in (2, 4):
        values = (0.02 * rng.standard_normal(lanes)).astype(np.float32)
        old = values if dtype.lane == 4 else values.view(np.uint16)[1::2]
        old = np.ascontiguousarray(old).view(f"<u{dtype.lane}")
    else:
        old = rng.integers(0, 256, lanes * dtype.lane, np.uint8).view(f"<u{dtype.lane}")
    new = old + ((rng.random(lanes) < rng.random()) * rng.integers(0, 9, lanes)).astype(old.dtype)
    return new.view(np.uint8), old.view(np.uint8)


def spoiled(codec: Codec, payload: bytes, rng: np.random.Generator) -> bytes:
    """Return a payload with a hostile change."""
    if rng.random() < 0.1 or codec in (RAW, SAME):
        return _bytes(payload, rng)
    if codec is COMPACT:
        return _compact(payload, rng)
    if codec in BY_CLASS:
        return _by_class(codec, payload, rng)
    if codec is SPARSE:
        (count,) = struct.unpack_from("<I", payload)
        count = _number(count, rng) if rng.random() < 0.5 else count
        return struct.pack("<I", count) + _frame(payload[4:], rng)
    return _frame(payload, rng)


def _by_class(codec: Codec, payload: bytes, rng: np.random.Generator) -> bytes:
    header = list(_HEADER.unpack_from(payload))
    middle = _HEADER.size + header[3]
    first, rest = payload[_HEADER.size : middle], payload[middle:]
    kind = rng.integers(4)
    if kind == 0:
        first = _frame(first, rng) if codec is EXPONENT_CLASSES else _bytes(first, rng)
        header[3] = len(first)
    elif kind == 1:
        rest = _bytes(rest, rng)
    if kind > 1 or rng.random() < 0.3:
        at = int(rng.integers(8))
        most = (2**32, 2**32, 2**32, 2**32, 2**32, 2**8, 2**8, 2**16)[at]
        header[at] = _number(header[at], rng) % most
    return _HEADER.pack(*header) + first + rest


def _compact(payload: bytes, rng: np.random.Generator) -> bytes:
    numbers, at = compact_codec._decode_numbers(payload, 4)
    head, parts = bytearray(payload[:4]), []
    for length in (numbers[3], numbers[4], len(payload)):
        parts.append(payload[at : at + length])
        at += length
    kind = rng.integers(5)
    if kind < 3:
        parts[kind] = _bytes(parts[kind], rng)
        numbers[3], numbers[4] = len(parts[0]), len(parts[1])
    elif kind == 3:
        head[rng.integers(4)] = rng.integers(256)
    if kind > 3 or rng.random() < 0.3:
        at = int(rng.integers(6))
        numbers[at] = _number(numbers[at], rng)
    return b"".join([head, *map(compact_codec.encode_number, numbers), *parts])


def _number(value: int, rng: np.random.Generator) -> int:
    near = rng.random() < 0.6
    changed = value + int(rng.integers(-3, 4)) if near else _ODD[rng.integers(len(_ODD))]
    return changed % 2**32


def _bytes(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(changed) + 1))
        kind = rng.integers(4)
        if kind == 0:
            changed[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 9), np.uint8))
        elif kind == 1:
            del changed[at : at + int(rng.integers(1, 9))]
        else:
            changed[at : at + 1] = bytes([rng.integers(256)])
    return bytes(changed)


def _frame(frame: bytes, rng: np.random.Generator) -> bytes:
    """Return a frame of changed content, which states its length or not."""
    data = _bytes(zstandard.ZstdDecompressor().decompressobj().decompress(frame), rng)
    states = bool(rng.random() < 0.7)
    again = zstandard.ZstdCompressor(write_content_size=states).compress(data)
    return _bytes(again, rng) if rng.random() < 0.1 else again


def main(count: int, seed: int) -> None:
    """Decode many."""
    for number in range(count):
        attack(np.random.default_rng([seed, number]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
