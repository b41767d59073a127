"""The encoders of codecs 6 and 7, which the store only reads.

Example::

    changes = find_older_changes(new, old, layout, compiled)
    payload = encode_classes(changes)                         # or
    payload = encode_adaptive(old, layout, changes, compiled)
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec import adaptive_codec, arithmetic_coder, exponent_codec, rans
from msft_store.codec.changes import (
    EXTRA_BITS,
    FIRST_CLASS,
    GAP_CONTEXT,
    RUN_CONTEXT,
    ChunkChanges,
    FloatLayout,
    zero_context,
)
from msft_store.codec.kernels import Lanes
from msft_store.codec.rans import SYMBOLS
from msft_store.format.layout import get_compressor

Array = NDArray[Any]


def find_older_changes(new: Lanes, old: Lanes, layout: FloatLayout, compiled: Any) -> ChunkChanges:
    """Return the changes as these codecs code them."""
    found = exponent_codec.find_changes(new, old, replace(layout, fine=1), compiled)
    # There is no context for references of zero.
    is_zero = found.symbols >= zero_context(found) << 8
    symbols = np.where(is_zero, FIRST_CLASS << 8 | found.symbols & 255, found.symbols)
    return replace(found, symbols=symbols.astype(np.uint16))


def encode_classes(found: ChunkChanges) -> bytes:
    """Return the payload of codec 6."""
    histogram = np.zeros((FIRST_CLASS + found.high - found.low + 1) * SYMBOLS, np.int64)
    plain = exponent_codec.list_runs_and_gaps(found)
    parts = [(*plain, EXTRA_BITS), (found.symbols, found.distances, EXTRA_BITS)]
    low_bits = exponent_codec.write_low_bits(parts, histogram)
    levels = rans.compute_levels(histogram)
    packed = rans.compute_frequencies(levels)
    coded = [rans.encode(part, packed, rans.count_coders(part.size)) for part, _, _ in parts]
    return _join(found, _encode_tables(levels), low_bits, b"".join(c.tobytes() for c in coded))


def encode_adaptive(old: Lanes, layout: FloatLayout, found: ChunkChanges, compiled: Any) -> bytes:
    """Return the payload of codec 7."""
    plain_symbols, plain = exponent_codec.list_runs_and_gaps(found)
    contexts, plain_symbols = plain_symbols >> 8, append_halves(plain_symbols, plain)
    symbols = append_halves(found.symbols, found.distances)
    bits = adaptive_codec.FINE_BITS
    parts = [(plain_symbols, plain, bits), (symbols, found.distances, bits)]
    unused = np.zeros(arithmetic_coder.PLACES, np.int64)
    low_bits = exponent_codec.write_low_bits(parts, unused)
    positions = exponent_codec.locate_listed(
        old, layout, found, found.gaps, compiled, count=found.symbols.size
    )
    exponents = exponent_codec.compute_exponents(old, positions, layout, compiled)
    first = encode_symbols(plain_symbols, contexts, RUN_CONTEXT, GAP_CONTEXT, compiled)
    rest = encode_symbols(symbols, exponents, found.low, found.high, compiled)
    return _join(found, first, low_bits, rest)


def append_halves(symbols: Array, distances: Array) -> Array:
    """Return uint16 symbols whose context is replaced by the half, the highest of the low bits."""
    token = symbols >> 2 & 63
    bits = EXTRA_BITS[token]
    half = np.where(bits > 0, distances >> np.maximum(bits, 1) - 1 & 1, 0)
    symbols_with_halves: Array = ((token << 1 | half) << 2 | symbols & 3).astype(np.uint16)
    return symbols_with_halves


def encode_symbols(symbols: Array, exponents: Array, low: int, high: int, compiled: Any) -> bytes:
    """Return the bytes of one sequence of codec 7."""
    if symbols.size == 0:
        return b""
    data = np.zeros(arithmetic_coder.MAX_SYMBOL_BYTES * (symbols.size + 1), np.uint8)
    given = exponents, low, high
    used = adaptive_codec.code(True, data, given, symbols.astype(np.int16), compiled)
    return data[:used].tobytes()


def _join(found: ChunkChanges, first: bytes, low_bits: bytes, rest: bytes) -> bytes:
    words = low_bits + bytes(-len(low_bits) % 4)
    runs = 0 if found.runs is None else found.runs.size
    busy = found.busy | (exponent_codec.ALL_BLOCKS_CODED if found.runs is None else 0)
    sizes = (found.symbols.size, found.gaps.size, runs, len(first), len(words) // 4)
    return struct.pack("<5IBBH", *sizes, found.low, found.high, busy) + first + words + rest


def _encode_tables(levels: Array) -> bytes:
    table = levels.reshape(-1, SYMBOLS)
    columns = np.flatnonzero(table.any(axis=0))
    used = int(columns[-1]) + 1 if columns.size else 1
    rows = table[:, :used]
    steps = np.diff(rows, axis=0, prepend=np.zeros((1, used), np.uint8))
    return get_compressor(3).compress(steps.tobytes())
