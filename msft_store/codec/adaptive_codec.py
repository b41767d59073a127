"""Codec 7: the changes of codec 6, coded with adaptive probabilities.

It is smaller than codec 6 and slower; ``docs/FORMAT.md``, section 5, has the format. As in
:mod:`msft_store.codec.exponent_codec`, the payload is the same with and without compiled kernels,
and a damaged payload is a :class:`ValueError`.

Example::

    compiled = compiled_kernels()                     # or None without Numba
    changes = exponent_codec.find_changes(new, old, layout, compiled)
    payload = encode(old, layout, changes, compiled)
    decode_in_place(payload, old, layout, compiled)   # old is now equal to new
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec import arithmetic_coder, exponent_codec
from msft_store.codec.changes import (
    DIRECT_TOKENS,
    EXTRA_BITS,
    GAP_CONTEXT,
    RUN_CONTEXT,
    SMALLEST,
    ChunkChanges,
    FloatLayout,
)
from msft_store.codec.kernels import Lanes

Array = NDArray[Any]


FINE_BITS = np.repeat(EXTRA_BITS, 2)
FINE_BITS[2 * DIRECT_TOKENS :] -= 1
"""Number of low bits that follow each token and half."""
FINE_SMALLEST = np.repeat(SMALLEST, 2)
FINE_SMALLEST[2 * DIRECT_TOKENS + 1 :: 2] += np.uint32(1) << FINE_BITS[2 * DIRECT_TOKENS + 1 :: 2]
"""The smallest distance of each token and half."""


def encode(old: Lanes, layout: FloatLayout, found: ChunkChanges, compiled: Any) -> bytes:
    """Return the payload of the changes."""
    plain_symbols, plain = exponent_codec.list_runs_and_gaps(found)
    contexts, plain_symbols = plain_symbols >> 8, append_halves(plain_symbols, plain)
    symbols = append_halves(found.symbols, found.distances)
    parts = [(plain_symbols, plain), (symbols, found.distances)]
    unused = np.zeros(arithmetic_coder.PLACES, np.int64)
    words = exponent_codec.write_low_bits(parts, FINE_BITS, unused, compiled)
    count = found.symbols.size
    positions = exponent_codec.locate_listed(old, layout, found, found.gaps, compiled, count=count)
    exponents = exponent_codec.compute_exponents(old, positions, layout, compiled)
    first = _encode_symbols(plain_symbols, contexts, RUN_CONTEXT, GAP_CONTEXT, compiled)
    rest = _encode_symbols(symbols, exponents, found.low, found.high, compiled)
    return exponent_codec.join_payload(found, first, words, rest)


def decode_in_place(payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any) -> None:
    """Replace the reference in ``old`` by the decoded lanes; an error leaves ``old`` undefined."""
    exponent_codec.decode_in_place(payload, old, layout, compiled, _ArithmeticReader)


def restores(
    payload: bytes, size: int, found: ChunkChanges, layout: FloatLayout, compiled: Any
) -> bool:
    """See :func:`msft_store.codec.exponent_codec.restores`."""
    reader = _ArithmeticReader
    return exponent_codec.restores(payload, size, found, layout, compiled, reader=reader)


class _ArithmeticReader:
    tokens = (FINE_BITS, FINE_SMALLEST)

    def __init__(self, first: bytes, rest: bytes, low: int, high: int, compiled: Any) -> None:
        self._first, self._rest, self._low, self._high = first, rest, low, high
        self._compiled = compiled

    def read_runs_and_gaps(self, contexts: Array) -> Array:
        return _decode_symbols(self._first, contexts, RUN_CONTEXT, GAP_CONTEXT, self._compiled)

    def read_changes(self, exponents: Array) -> Array:
        return _decode_symbols(self._rest, exponents, self._low, self._high, self._compiled)


def append_halves(symbols: Array, distances: Array) -> Array:
    """Return uint16 symbols whose context is replaced by the half, the highest of the low bits."""
    token = symbols >> 2 & 63
    bits = EXTRA_BITS[token]
    half = np.where(bits > 0, distances >> np.maximum(bits, 1) - 1 & 1, 0)
    symbols_with_halves: Array = ((token << 1 | half) << 2 | symbols & 3).astype(np.uint16)
    return symbols_with_halves


def _encode_symbols(symbols: Array, exponents: Array, low: int, high: int, compiled: Any) -> bytes:
    if symbols.size == 0:
        return b""
    data = np.zeros(arithmetic_coder.MAX_SYMBOL_BYTES * (symbols.size + 1), np.uint8)
    used = _code(True, data, (exponents, low, high), symbols.astype(np.int16), compiled)
    return data[:used].tobytes()


def _decode_symbols(data: bytes, exponents: Array, low: int, high: int, compiled: Any) -> Array:
    symbols, used = np.zeros(exponents.size, np.int16), 0
    if symbols.size:
        coded = np.frombuffer(bytearray(data), np.uint8)
        used = _code(False, coded, (exponents, low, high), symbols, compiled)
    if used != len(data):
        raise ValueError("an adaptive chunk has the wrong length")
    return symbols.astype(np.uint16)


def _code(
    encoding: bool, data: Array, given: tuple[Array, int, int], symbols: Array, compiled: Any
) -> int:
    """Run the coder on the exponents, ``low`` and ``high`` in ``given``; return the bytes used."""
    exponents, low, high = given
    counters, rates = arithmetic_coder.make_counters(), arithmetic_coder.RATES
    used: int
    if compiled is not None:
        wide = exponents.astype(np.int16)
        used = compiled.code_symbols(encoding, data, wide, low, high, symbols, *counters, rates)
        return used
    # Interpreted code is much faster on lists than on arrays, and their integers never overflow.
    one, other = ([0] * counter.size for counter in counters)
    coded = symbols.tolist()
    used = arithmetic_coder.code_symbols(
        encoding, data.data, exponents.tolist(), low, high, coded, one, other, rates.tolist()
    )
    symbols[:] = coded
    return used
