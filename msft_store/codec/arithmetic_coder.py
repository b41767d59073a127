"""Codec 7's entropy coder: an adaptive binary arithmetic coder.

A symbol is a sequence of decisions: if there is a change, the smallest distances one by one, then
the bits of its token, its direction and its half. The probability of a decision is the mean of two
counters. One belongs to its place in the sequence and the exponent. The other belongs to its place
and to how far the elements before it moved, relative to the exponent, because neighbours in a row
move alike. All arithmetic is in integers, so every machine gives the same bytes.
``docs/FORMAT.md``, section 5, defines the terms.

The same source runs compiled on arrays (:mod:`msft_store.codec.numba_kernels`) and interpreted on
lists.

Example::

    used = code_symbols(True, data, exponents, 110, 121, symbols, *make_counters(), RATES)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PLACES = 512
"""Places of decisions: 0 to 3 for a change and the smallest distances, 4 to 6 for their direction,
from 128 for the token's bits, from 256 for the direction, from 384 for the half."""
_MAX_EXPONENTS = 64
_MOVEMENTS = 16 * 64
RATES = np.array([(1 << 17) // (2 * seen + 3) for seen in range(256)], np.int64)
"""The step of a counter towards a bit, in 65536ths, by the number of decisions it has seen."""
MAX_SYMBOL_BYTES = 20
"""Largest number of bytes of a symbol: 13 decisions of 11 bits, and a few for the end."""


def make_counters() -> tuple[Array, Array]:
    """Return the initial counters by exponent and by movement, int32.

    A counter holds a signed probability in its upper 24 bits, of which 20 are used and 0 means one
    half, and the number of decisions it has seen in its lower 8 bits.
    """
    return np.zeros(_MAX_EXPONENTS * PLACES, np.int32), np.zeros(_MOVEMENTS * PLACES, np.int32)


def code_symbols(
    encoding: Any,
    data: Any,
    exponents: Any,
    low: Any,
    high: Any,
    symbols: Any,
    by_exponent: Any,
    by_movement: Any,
    rates: Any,
) -> Any:
    """Write ``symbols`` to ``data``, or read them from it; return the number of bytes used.

    A symbol is ``(token << 1 | half) << 2 | towards zero << 1 | sign flipped``. Beyond the end of
    ``data`` zeros are read.
    """
    value, at = 0, 0
    if not encoding:
        for _ in range(4):
            value = value << 8 | (data[at] if at < len(data) else 0)
            at += 1
    # The interval from bottom to top, the value that is read, and the position in the data.
    coder = 0, 0xFFFFFFFF, value, at
    tables = data, by_exponent, by_movement, rates
    quick = slow = exponents[0] << 9
    for i in range(len(exponents)):
        exponent = exponents[i]
        # The mask shows the compiler that no index is negative.
        here = (min(max(exponent, low), high) - low << 9) & 0x7FFF
        nearest = min(max((quick >> 8) - 2 * exponent + 8, 0), 63) >> 2
        nearby = min(max((slow >> 8) - 2 * exponent + 8, 0), 63)
        there = (nearest << 6 | nearby) << 9
        symbol = symbols[i] if encoding else 0
        token, flipped = symbol >> 3, symbol & 1
        path, towards, half = flipped << 6 | token, symbol >> 1 & 1, symbol >> 2 & 1
        bit = 1 if symbol != 0 else 0
        bit, coder = code_decision(encoding, bit, tables, here, there, coder)
        if not bit:
            token = flipped = towards = half = 0
            moved = 2 * exponent - 2
        else:
            place, bit = 0, 0
            while bit == 0 and place < 3:
                place += 1
                bit = 1 if path == place else 0
                bit, coder = code_decision(
                    encoding, bit, tables, here + place, there + place, coder
                )
            if bit:
                token, flipped = place, 0
                place += 3
            else:
                place = 1
                for depth in range(7):
                    bit = path >> (6 - depth) & 1
                    a, b = here + 128 + place, there + 128 + place
                    bit, coder = code_decision(encoding, bit, tables, a, b, coder)
                    place = place << 1 | bit
                token, flipped = place & 63, place >> 6 & 1
                place = 256 + 2 * token + flipped
            if token > 0:
                a, b = here + place, there + place
                towards, coder = code_decision(encoding, towards, tables, a, b, coder)
            if token >= 4:
                place = 384 + 2 * token + flipped
                a, b = here + place, there + place
                half, coder = code_decision(encoding, half, tables, a, b, coder)
            moved = 2 * exponent + (token if token > 1 else 0)
        if not encoding:
            symbols[i] = token << 3 | half << 2 | towards << 1 | flipped
        quick += (moved << 8) - quick >> 3
        slow += (moved << 8) - slow >> 6
    _, top, value, at = coder
    if encoding:
        for _ in range(4):
            data[at] = top >> 24
            top = top << 8 & 0xFFFFFFFF
            at += 1
    return at


def code_decision(encoding: Any, bit: Any, tables: Any, here: Any, there: Any, coder: Any) -> Any:
    """Encode or decode one bit; return the bit and the next state of the coder."""
    data, by_exponent, by_movement, rates = tables
    bottom, top, value, at = coder
    one, two = by_exponent[here], by_movement[there]
    probability = min(max((one + two >> 13) + 32768, 32), 65504)
    span = top - bottom
    middle = bottom + (span >> 16) * probability + ((span & 0xFFFF) * probability >> 16)
    if not encoding:
        bit = 1 if value <= middle else 0
    if bit:
        top = middle
    else:
        bottom = middle + 1
    while (bottom ^ top) & 0xFF000000 == 0:
        if encoding:
            data[at] = top >> 24
        else:
            value = (value << 8 & 0xFFFFFFFF) | (data[at] if at < len(data) else 0)
        at += 1
        bottom = bottom << 8 & 0xFFFFFFFF
        top = (top << 8 & 0xFFFFFFFF) | 0xFF
    goal = bit * 0xFFFFF - 0x80000
    seen, before = one & 255, one >> 8
    by_exponent[here] = before + ((goal - before) * rates[seen] >> 16) << 8 | min(seen + 1, 255)
    seen, before = two & 255, two >> 8
    by_movement[there] = before + ((goal - before) * rates[seen] >> 16) << 8 | min(seen + 1, 255)
    return bit, (bottom, top, value, at)
