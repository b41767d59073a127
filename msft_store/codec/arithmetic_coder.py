"""The loop of codec 7: symbols coded bit by bit, each bit with a chance that adapts.

A symbol is a path of yes-or-no decisions: changed at all, the smallest distances one by one, then
its token bit by bit, direction, half. A decision's chance is the mean of two counters: one of its
place in the path and the class, the other of its place and how far the weights before it moved,
compared with its own exponent: neighbours in a row move alike. Integers alone, so that every
machine gives the same bytes. ``docs/FORMAT.md``, section 5.

The same source runs compiled on arrays (:mod:`msft_store.codec.numba_kernels`) and interpreted on
lists.

Example::

    used = code(True, data, exponents, 110, 121, symbols, *counters(), RATES)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PLACES = 512
"""Places in the path: 0 to 3 changed and the smallest distances, 4 to 6 their direction, from 128
the token's bits, from 256 the direction, from 384 the half. Those that come most are neighbours."""
CLASSES = 64
_NEAR = 16 * 64
RATES = np.array([(1 << 17) // (2 * seen + 3) for seen in range(256)], np.int64)
"""How far a counter moves towards a bit, in 65536ths, by how much it has seen."""
MAX_SYMBOL_BYTES = 20
"""Bytes that a symbol takes at most: 13 decisions of 11 bits, and a few for the end."""


def make_counters() -> tuple[Array, Array]:
    """Return the counters by class and by movement, before they have seen anything; int32.

    A counter is 24 bits of chance, signed, of which 20 are used, 0 being even, and 8 bits of how
    much it has seen.
    """
    return np.zeros(CLASSES * PLACES, np.int32), np.zeros(_NEAR * PLACES, np.int32)


def code_symbols(
    encoding: Any,
    data: Any,
    exponents: Any,
    low: Any,
    high: Any,
    symbols: Any,
    by_class: Any,
    by_movement: Any,
    rates: Any,
) -> Any:
    """Write ``symbols`` to ``data``, or read them from it; return how many bytes that takes.

    A symbol is ``(token << 1 | half) << 2 | towards zero << 1 | sign flipped``. Reading goes on
    with zeros beyond the end of ``data``.
    """
    bottom, top, value, at = 0, 0xFFFFFFFF, 0, 0
    if not encoding:
        for _ in range(4):
            value = value << 8 | (data[at] if at < len(data) else 0)
            at += 1
    quick = slow = exponents[0] << 9
    for i in range(len(exponents)):
        exponent = exponents[i]
        # Masked, so that a compiler sees that no index is negative.
        mine = (min(max(exponent, low), high) - low << 9) & 0x7FFF
        nearest = min(max((quick >> 8) - 2 * exponent + 8, 0), 63) >> 2
        nearby = min(max((slow >> 8) - 2 * exponent + 8, 0), 63)
        moving = (nearest << 6 | nearby) << 9
        symbol = symbols[i] if encoding else 0
        token, flipped = symbol >> 3, symbol & 1
        path, towards, half = flipped << 6 | token, symbol >> 1 & 1, symbol >> 2 & 1
        bit, bottom, top, value, at = code_decision(
            encoding,
            1 if symbol != 0 else 0,
            data,
            by_class,
            mine,
            by_movement,
            moving,
            rates,
            bottom,
            top,
            value,
            at,
        )
        if not bit:
            token = flipped = towards = half = 0
            moved = 2 * exponent - 2
        else:
            place, bit = 0, 0
            while bit == 0 and place < 3:
                place += 1
                bit, bottom, top, value, at = code_decision(
                    encoding,
                    1 if path == place else 0,
                    data,
                    by_class,
                    mine + place,
                    by_movement,
                    moving + place,
                    rates,
                    bottom,
                    top,
                    value,
                    at,
                )
            if bit:
                token, flipped = place, 0
                place += 3
            else:
                place = 1
                for depth in range(7):
                    bit, bottom, top, value, at = code_decision(
                        encoding,
                        path >> (6 - depth) & 1,
                        data,
                        by_class,
                        mine + 128 + place,
                        by_movement,
                        moving + 128 + place,
                        rates,
                        bottom,
                        top,
                        value,
                        at,
                    )
                    place = place << 1 | bit
                token, flipped = place & 63, place >> 6 & 1
                place = 256 + 2 * token + flipped
            if token > 0:
                towards, bottom, top, value, at = code_decision(
                    encoding,
                    towards,
                    data,
                    by_class,
                    mine + place,
                    by_movement,
                    moving + place,
                    rates,
                    bottom,
                    top,
                    value,
                    at,
                )
            if token >= 4:
                place = 384 + 2 * token + flipped
                half, bottom, top, value, at = code_decision(
                    encoding,
                    half,
                    data,
                    by_class,
                    mine + place,
                    by_movement,
                    moving + place,
                    rates,
                    bottom,
                    top,
                    value,
                    at,
                )
            moved = 2 * exponent + (token if token > 1 else 0)
        if not encoding:
            symbols[i] = token << 3 | half << 2 | towards << 1 | flipped
        quick += (moved << 8) - quick >> 3
        slow += (moved << 8) - slow >> 6
    if encoding:
        for _ in range(4):
            data[at] = top >> 24
            top = top << 8 & 0xFFFFFFFF
            at += 1
    return at


def code_decision(
    encoding: Any,
    bit: Any,
    data: Any,
    by_class: Any,
    here: Any,
    by_movement: Any,
    there: Any,
    rates: Any,
    bottom: Any,
    top: Any,
    value: Any,
    at: Any,
) -> Any:
    """Code or decode one bit; return it and the coder as it is then."""
    one, two = by_class[here], by_movement[there]
    chance = min(max((one + two >> 13) + 32768, 32), 65504)
    span = top - bottom
    middle = bottom + (span >> 16) * chance + ((span & 0xFFFF) * chance >> 16)
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
    by_class[here] = before + ((goal - before) * rates[seen] >> 16) << 8 | min(seen + 1, 255)
    seen, before = two & 255, two >> 8
    by_movement[there] = before + ((goal - before) * rates[seen] >> 16) << 8 | min(seen + 1, 255)
    return bit, bottom, top, value, at
