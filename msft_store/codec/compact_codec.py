"""Codec 9: the changes of codec 6 with compact tables, and new values where the reference is zero.

Tables take half the bytes of codec 6's, coders and header less than that. A change from zero is a
whole new number, so its token is the exponent of that number and the two highest bits of its
mantissa. ``docs/FORMAT.md``, section 5, has the format. As in
:mod:`msft_store.codec.exponent_codec`, the payload is the same with and without compiled kernels,
and a damaged payload is a :class:`ValueError`.

Example::

    compiled = compiled_kernels()                     # or None without Numba
    changes = exponent_codec.find_changes(new, old, layout, compiled)
    payload = encode(changes, layout, compiled)
    decode_in_place(payload, old, layout, compiled)   # old is now equal to new
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec import exponent_codec, kernels, rans, table_coder
from msft_store.codec.changes import (
    EXTRA_BITS,
    GAP_CONTEXT,
    RUN_CONTEXT,
    SMALLEST,
    TOKENS,
    ChunkChanges,
    FloatLayout,
    Listing,
    build_tokens,
    zero_context,
)
from msft_store.codec.exponent_codec import ALL_BLOCKS_CODED
from msft_store.codec.kernels import Lanes
from msft_store.codec.rans import BLOCK, EXPONENTS, MAX_CLASSES, SYMBOLS

Array = NDArray[Any]

_HEADER = struct.Struct("<BBH")
"""low, high, busy; then :data:`_NUMBERS` numbers of variable length."""
_NUMBERS = 6
"""Listed lanes, gaps, runs, bytes of tables, bytes of low bits, and the least new value."""
_MAX_NUMBER_BYTES = 5
FINE_BITS = 2
"""Bits of the mantissa that are part of the token of a new value."""
SYMBOLS_PER_CODER = 2048
"""A coder costs two bytes more than it saves, and a few keep a processor busy."""
MAX_CODERS = 64
_ALL_TOKENS = 128 * TOKENS
"""The tokens of all contexts, of which there are at most 67, as a power of two."""


def encode(found: ChunkChanges, layout: FloatLayout, compiled: Any) -> bytes:
    """Return the payload of the changes."""
    runs = np.zeros(0, np.int64) if found.runs is None else found.runs
    busy = found.busy | (ALL_BLOCKS_CODED if found.runs is None else 0)
    if compiled is not None:
        payload: Array = compiled.encode_payload(
            (found.low, found.high, busy),
            (_as_input(runs, np.int64), _as_input(found.gaps, np.uint32)),
            (_as_input(found.symbols, np.uint16), _as_input(found.distances, np.uint32)),
            _compiled_layout(layout),
        )
        return payload.tobytes()
    parts, least = list_symbols(found, layout)
    histogram = np.zeros((zero_context(found) + 1) * SYMBOLS, np.int64)
    low_bits = exponent_codec.write_low_bits(parts, histogram)
    levels = rans.compute_levels(histogram)
    tables = table_coder.encode_tables(levels)
    packed = rans.compute_frequencies(levels)
    coded = [rans.encode(part, packed, count_coders(part.size)) for part, _, _ in parts]
    numbers = (found.symbols.size, found.gaps.size, runs.size, len(tables), len(low_bits), least)
    return b"".join(
        [
            _HEADER.pack(found.low, found.high, busy),
            *map(encode_number, numbers),
            tables,
            low_bits,
            *(part.tobytes() for part in coded),
        ]
    )


def _compiled_layout(layout: FloatLayout) -> tuple[int, int, int]:
    """Return the layout as compiled loops take it."""
    return layout.shift, layout.mask.bit_length(), layout.fine


def _as_input(values: Array, dtype: Any) -> Array:
    # Numba compiles a loop for each kind of array, so the loops get only one.
    given: Array = np.ascontiguousarray(values, dtype)
    return given if given.flags.writeable else given.copy()


def list_symbols(
    found: ChunkChanges, layout: FloatLayout
) -> tuple[list[tuple[Array, Array, Array]], int]:
    """Return symbols, values and bits a token of each sequence, and the least new value.

    The bits of the second sequence are those of each context's tokens.
    """
    zero = zero_context(found)
    symbols, least = found.symbols, 0
    places = np.flatnonzero(symbols >= zero << 8)
    if places.size:
        tokens, least = _choose_tokens(found.distances[places], layout)
        symbols = symbols.copy()
        symbols[places] = (symbols[places] & 0xFF01) | tokens << 2
    bits = np.zeros(_ALL_TOKENS, np.uint8)
    bits[: zero * TOKENS] = np.tile(build_tokens(layout.fine)[0], zero)
    bits[zero * TOKENS : (zero + 1) * TOKENS] = _value_bits(layout)
    plain = exponent_codec.list_runs_and_gaps(found)
    return [(*plain, EXTRA_BITS), (symbols, found.distances, bits)], least


def decode_in_place(
    payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any, *, keep: bool = False
) -> tuple[Array, Array]:
    """Replace the reference in ``old`` by the decoded lanes; an error leaves ``old`` undefined.

    Returns the positions of the listed lanes and, with ``keep``, what these lanes were.
    """
    lanes = old.view(f"<u{old.itemsize}")
    if compiled is not None:
        data = np.frombuffer(payload, np.uint8)
        found: tuple[Array, Array] = compiled.decode_payload(
            data, lanes, _compiled_layout(layout), keep
        )
        return found
    streams = _open_streams(payload, old.size, layout)
    positions = exponent_codec.locate_listed(
        old, layout, streams.listing, streams.gaps, None, count=streams.count
    )
    before = lanes[positions if keep else positions[:0]]
    contexts = exponent_codec.compute_contexts(old, positions, layout, streams.listing)
    _apply(streams, old, positions, contexts, layout=layout)
    return positions, before


def restores(
    payload: bytes, size: int, found: ChunkChanges, layout: FloatLayout, compiled: Any
) -> bool:
    """Return True if a payload decodes to the ``size`` lanes in which changes were found.

    The search has compared all lanes, so a payload is proven by the elements that it lists and by
    their values. ``found`` must hold those, and there must be compiled kernels.
    """
    listed = found.listed
    if listed is None:
        return False
    data = np.frombuffer(payload, np.uint8)
    given = listed.positions, listed.references, listed.values
    changes = _as_input(found.symbols, np.uint16), _as_input(found.distances, np.uint32)
    try:
        proven: bool = compiled.proves(data, size, given, changes, _compiled_layout(layout))
    except ValueError:
        return False
    return proven


@dataclass(frozen=True, kw_only=True)
class _Streams:
    """The opened streams of a payload."""

    listing: Listing
    count: int
    """Number of listed lanes."""
    gaps: Array
    symbols: exponent_codec.WordReader
    words: Array
    """Words of low bits, and two more."""
    start: int
    """First low bit of the changes."""
    end: int
    least: int


def _open_streams(payload: bytes, size: int, layout: FloatLayout) -> _Streams:
    """Read a payload for ``size`` lanes up to the symbols of changes; or :class:`ValueError`."""
    if len(payload) < _HEADER.size:
        raise ValueError("a compact chunk has no header")
    low, high, busy = _HEADER.unpack_from(payload)
    all_coded, busy = bool(busy & ALL_BLOCKS_CODED), busy & (ALL_BLOCKS_CODED - 1)
    (count, gaps, runs, table_bytes, low_bytes, least), at = _decode_numbers(payload, _HEADER.size)
    blocks = 0 if all_coded else -(-size // BLOCK)
    if max(count, gaps) > size or runs > blocks or at + table_bytes + low_bytes > len(payload):
        raise ValueError("a compact chunk has the wrong length")
    if low > high or high - low >= MAX_CLASSES or busy > EXPONENTS or least > layout.mask:
        raise ValueError("a compact chunk has impossible exponents")
    listing = Listing(low=low, high=high, busy=busy, runs=None)
    tables = payload[at : at + table_bytes]
    levels = table_coder.decode_tables(tables, zero_context(listing) + 1)
    at += table_bytes
    # The loops read two words beyond the last one.
    low_bits = payload[at : at + low_bytes] + bytes(8 + -low_bytes % 4)
    words = np.frombuffer(low_bits, "<u4")
    symbols = exponent_codec.WordReader(levels, payload[at + low_bytes :], count_coders, None)
    end = 8 * low_bytes
    plain = np.repeat(np.array([RUN_CONTEXT, GAP_CONTEXT], np.uint8), [runs, gaps])
    values, start = kernels.read_distances(symbols.read(plain), words, 0, end, EXTRA_BITS, SMALLEST)
    if start > end:
        raise ValueError("a compact chunk ends too early")
    return _Streams(
        listing=listing if all_coded else replace(listing, runs=values[:runs]),
        count=count,
        gaps=values[runs:],
        symbols=symbols,
        words=words,
        start=start,
        end=end,
        least=least,
    )


def _apply(
    streams: _Streams,
    old: Lanes,
    positions: Array,
    contexts: Array,
    *,
    layout: FloatLayout,
) -> None:
    """Change the lanes at the positions in place; :class:`ValueError` if the streams do not fit."""
    lanes = old.view(f"<u{old.itemsize}")
    symbols, zero = streams.symbols.read(contexts), zero_context(streams.listing)
    streams.symbols.finish()
    bits, smallest = build_tokens(layout.fine)
    if contexts.size and contexts.max() == zero:
        values = _value_bits(layout), _smallest_values(streams.least, layout)
        bits = np.concatenate([np.tile(bits, zero), values[0]])
        smallest = np.concatenate([np.tile(smallest, zero), values[1]])
        symbols = contexts.astype(np.uint16) << np.uint16(8) | symbols
    low_bits = streams.words, streams.start, streams.end, layout.sign, bits, smallest
    end = kernels.apply_changes(lanes, positions, symbols, *low_bits)
    if not 0 <= streams.end - end < 8:
        raise ValueError("a compact chunk has the wrong number of low bits")


def count_coders(count: int) -> int:
    """Return the number of coders that share ``count`` symbols."""
    return rans.count_coders(count, each=SYMBOLS_PER_CODER, most=MAX_CODERS)


def encode_number(number: int) -> bytes:
    """Return a number as groups of seven bits, the lowest first; all but the last have bit 7."""
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _decode_numbers(payload: bytes, at: int) -> tuple[list[int], int]:
    numbers = []
    for _ in range(_NUMBERS):
        number = 0
        for place in range(_MAX_NUMBER_BYTES):
            if at >= len(payload):
                raise ValueError("a compact chunk ends in its header")
            number |= (payload[at] & 127) << 7 * place
            at += 1
            if payload[at - 1] < 128:
                break
        else:
            raise ValueError("a compact chunk has a number of too many bytes")
        numbers.append(number)
    return numbers, at


def _choose_tokens(values: Array, layout: FloatLayout) -> tuple[Array, int]:
    """Return the tokens of new values, uint16, and the least value that has one of its own."""
    shares = values >> layout.shift - FINE_BITS
    # The window of tokens begins where it holds the most values.
    counts = np.cumsum(np.bincount(shares[values > 0], minlength=TOKENS))
    within = counts[TOKENS - 3 :] - np.append(0, counts[: -(TOKENS - 2)])
    least = int(np.argmax(within))
    places = shares.astype(np.int64) - least
    outside = (places < 0) | (places > TOKENS - 3)
    tokens = np.where(values == 0, 0, np.where(outside, 1, places + 2))
    return tokens.astype(np.uint16), least


@functools.cache
def _value_bits(layout: FloatLayout) -> Array:
    """Return the number of low bits of each token of a new value."""
    bits = np.full(TOKENS, layout.shift - FINE_BITS, np.uint8)
    bits[0], bits[1] = 0, layout.mask.bit_length()
    return bits


def _smallest_values(least: int, layout: FloatLayout) -> Array:
    """Return the smallest new value of each token."""
    shares = np.append([0, 0], np.arange(least, least + TOKENS - 2)).astype(np.uint64)
    values: Array = (shares << np.uint64(layout.shift - FINE_BITS)).astype(np.uint32)
    return values
