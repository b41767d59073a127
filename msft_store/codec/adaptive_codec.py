"""Codec 7: the changes of codec 6, coded with chances that adapt (``docs/FORMAT.md``, section 5).

It is smaller than codec 6 and slower. As in :mod:`msft_store.codec.exponent_codec`, the payload is
the same with and without compiled kernels, and a damaged payload is a :class:`ValueError`.

Example::

    compiled = compiled_kernels()                     # or None without Numba
    changes = exponent_codec.find_changes(new, old, layout, compiled)
    payload = encode(old, layout, changes, compiled)
    assert (decode(payload, old, layout, compiled) == new).all()
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec import arithmetic_coder, exponent_codec, kernels
from msft_store.codec.changes import (
    DIRECT_TOKENS,
    EXTRA_BITS,
    SMALLEST,
    ChunkChanges,
    FloatLayout,
    Listing,
)
from msft_store.codec.exponent_codec import ALL_BLOCKS_CODED
from msft_store.codec.kernels import Lanes
from msft_store.codec.rans import BLOCK, EXPONENTS, MAX_CLASSES

Array = NDArray[Any]

_HEADER = struct.Struct("<IIIIIBBH")
"""Counts of listed lanes, gaps and runs; bytes of the first sequence; words; low, high, busy."""
interpreted_coder: Any = arithmetic_coder.code_symbols
_RUN, _GAP = 0, 1
"""The exponents that runs and gaps are coded with."""
FINE_BITS = np.repeat(EXTRA_BITS, 2)
FINE_BITS[2 * DIRECT_TOKENS :] -= 1
"""Number of low bits that follow each token and half."""
FINE_SMALLEST = np.repeat(SMALLEST, 2)
FINE_SMALLEST[2 * DIRECT_TOKENS + 1 :: 2] += np.uint32(1) << FINE_BITS[2 * DIRECT_TOKENS + 1 :: 2]
"""The smallest distance of each token and half."""


def encode(old: Lanes, layout: FloatLayout, found: ChunkChanges, compiled: Any) -> bytes:
    """Return the payload of the changes."""
    runs = np.zeros(0, np.int64) if found.runs is None else found.runs
    plain = np.concatenate([runs, found.gaps]).astype(np.uint32)
    positions, _ = exponent_codec.locate_listed(old, layout, found, found.gaps, compiled)
    plain_symbols = append_halves(exponent_codec.compute_plain_symbols(runs.size, plain), plain)
    symbols = append_halves(found.symbols, found.distances)
    words, bits = np.zeros(plain.size + symbols.size + 2, np.uint32), 0
    unused = np.zeros(arithmetic_coder.PLACES, np.int64)
    write = (kernels if compiled is None else compiled).write_low_bits
    bits = write(plain_symbols, plain, FINE_BITS, unused, words, bits)
    bits = write(symbols, found.distances, FINE_BITS, unused, words, bits)
    words = words[: -(-bits // 32)]
    kinds = np.repeat(np.array([_RUN, _GAP]), [runs.size, found.gaps.size])
    head = _encode_symbols(plain_symbols, kinds, _RUN, _GAP, compiled)
    body = _encode_symbols(
        symbols, _exponents_at(old, positions, layout), found.low, found.high, compiled
    )
    busy = found.busy | (ALL_BLOCKS_CODED if found.runs is None else 0)
    sizes = (symbols.size, found.gaps.size, runs.size, len(head), words.size)
    header = _HEADER.pack(*sizes, found.low, found.high, busy)
    return b"".join([header, head, words.tobytes(), body])


def decode(payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any) -> Lanes:
    """Return the changed lanes; :class:`ValueError` if the payload is damaged."""
    new: Lanes = old.copy()
    decode_in_place(payload, new, layout, compiled)
    return new


def decode_in_place(payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any) -> None:
    """Replace the reference in ``old`` by the decoded lanes; an error leaves ``old`` undefined."""
    if len(payload) < _HEADER.size:
        raise ValueError("an adaptive chunk has no header")
    listed, gaps, runs, head_bytes, word_count, low, high, busy = _HEADER.unpack_from(payload)
    all_coded, busy = bool(busy & ALL_BLOCKS_CODED), busy & (ALL_BLOCKS_CODED - 1)
    at = _HEADER.size + head_bytes
    end = at + 4 * word_count
    blocks = 0 if all_coded else -(-old.size // BLOCK)
    if max(listed, gaps) > old.size or runs > blocks or end > len(payload):
        raise ValueError("an adaptive chunk has the wrong length")
    if low > high or high - low >= MAX_CLASSES or busy > EXPONENTS:
        raise ValueError("an adaptive chunk has impossible exponents")
    words = np.append(np.frombuffer(payload, "<u4", word_count, at), np.zeros(2, np.uint32))
    kinds = np.repeat(np.array([_RUN, _GAP]), [runs, gaps])
    plain_symbols = _decode_symbols(payload[_HEADER.size : at], kinds, _RUN, _GAP, compiled)
    read = (kernels if compiled is None else compiled).read_distances
    plain, bits = read(plain_symbols, words, 0, 32 * word_count, FINE_BITS, FINE_SMALLEST)
    if bits > 32 * word_count:
        raise ValueError("an adaptive chunk has the wrong number of low bits")
    listing = Listing(low=low, high=high, busy=busy, runs=None if all_coded else plain[:runs])
    positions, _ = exponent_codec.locate_listed(old, layout, listing, plain[runs:], compiled)
    if positions.size != listed:
        raise ValueError("an adaptive chunk lists another number of elements")
    symbols = _decode_symbols(
        payload[end:], _exponents_at(old, positions, layout), low, high, compiled
    )
    changed = old.view(f"<u{old.itemsize}")
    low_bits = (words, bits, 32 * word_count, layout.sign, FINE_BITS, FINE_SMALLEST)
    apply_changes = (kernels if compiled is None else compiled).apply_changes
    bits = apply_changes(changed, positions, symbols, *low_bits)
    if not 0 <= 32 * word_count - bits < 32:
        raise ValueError("an adaptive chunk has the wrong number of low bits")


def append_halves(symbols: Array, distances: Array) -> Array:
    """Return uint16 symbols whose context is replaced by the half, the highest of the low bits."""
    token = symbols >> 2 & 63
    bits = EXTRA_BITS[token]
    half = np.where(bits > 0, distances >> np.maximum(bits, 1) - 1 & 1, 0)
    symbols_with_halves: Array = ((token << 1 | half) << 2 | symbols & 3).astype(np.uint16)
    return symbols_with_halves


def _exponents_at(old: Lanes, positions: Array, layout: FloatLayout) -> Array:
    unsigned = old.view(f"<u{old.itemsize}")
    magnitudes = unsigned[positions] & unsigned.dtype.type(layout.mask)
    exponents: Array = (magnitudes >> unsigned.dtype.type(layout.shift)).astype(np.int16)
    return exponents


def _encode_symbols(symbols: Array, exponents: Array, low: int, high: int, compiled: Any) -> bytes:
    if symbols.size == 0:
        return b""
    room = arithmetic_coder.MAX_SYMBOL_BYTES * (symbols.size + 1)
    if compiled is None:
        coded = bytearray(room)
        arguments = (exponents.tolist(), low, high, symbols.tolist(), *_counters_as_lists())
        used = interpreted_coder(True, coded, *arguments, arithmetic_coder.RATES.tolist())
        return bytes(coded[:used])
    data = np.zeros(room, np.uint8)
    arguments = (exponents.astype(np.int16), low, high, symbols.astype(np.int16))
    used = compiled.code_symbols(
        True, data, *arguments, *arithmetic_coder.make_counters(), arithmetic_coder.RATES
    )
    taken: bytes = data[:used].tobytes()
    return taken


def _decode_symbols(data: bytes, exponents: Array, low: int, high: int, compiled: Any) -> Array:
    if exponents.size == 0:
        if data:
            raise ValueError("an adaptive chunk has the wrong length")
        return np.zeros(0, np.uint16)
    if compiled is None:
        symbols = [0] * exponents.size
        arguments = (exponents.tolist(), low, high, symbols, *_counters_as_lists())
        used = interpreted_coder(False, data, *arguments, arithmetic_coder.RATES.tolist())
        found = np.array(symbols, np.uint16)
    else:
        decoded = np.zeros(exponents.size, np.int16)
        arguments = (
            exponents.astype(np.int16),
            low,
            high,
            decoded,
            *arithmetic_coder.make_counters(),
        )
        coded = np.frombuffer(data, np.uint8).copy()
        used = compiled.code_symbols(False, coded, *arguments, arithmetic_coder.RATES)
        found = decoded.astype(np.uint16)
    if used != len(data):
        raise ValueError("an adaptive chunk has the wrong length")
    return found


def _counters_as_lists() -> list[list[int]]:
    # Interpreted code is much faster on lists than on arrays, and their integers never overflow.
    return [[0] * counter.size for counter in arithmetic_coder.make_counters()]
