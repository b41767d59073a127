"""The tables of codec 9, coded with adaptive probabilities.

A table holds a level for each symbol that its context has. Neighbouring contexts have about the
same symbols, a symbol is about as frequent as that of the opposite direction, and the frequencies
fall slowly with the distance. So each decision has two counters: one by the place of the decision,
and one by the levels around it. ``docs/FORMAT.md``, section 5, defines the terms. As in
:mod:`msft_store.codec.arithmetic_coder`, the same source runs compiled on arrays
(:mod:`msft_store.codec.numba_compact`) and interpreted on lists, with the same bytes.

Example::

    data = encode_tables(levels)                      # levels: uint8, a row of 256 for each context
    assert (decode_tables(data, contexts) == levels).all()
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec.arithmetic_coder import RATES, code_decision
from msft_store.codec.rans import LEVELS, SYMBOLS

Array = NDArray[Any]

COUNTERS = 1024
MAX_LEVEL_BYTES = 72
"""Largest number of bytes of a level: 51 decisions of 11 bits."""
_FIRST_LEVEL = 24
_HIGHEST_LEVEL = LEVELS.size


def encode_tables(levels: Array) -> bytes:
    """Return the bytes of the tables: the number of columns less 1, then the decisions."""
    table = levels.reshape(-1, SYMBOLS)
    columns = np.flatnonzero(table.any(axis=0))
    used = int(columns[-1]) + 1 if columns.size else 1
    data = np.zeros(MAX_LEVEL_BYTES * (np.count_nonzero(table) + table.size // 64 + 1), np.uint8)
    size = _code(True, data, levels.astype(np.int64), (len(table), used))
    # A reader reads zeros beyond the end.
    return bytes([used - 1]) + data[:size].tobytes().rstrip(b"\0")


def decode_tables(data: bytes, contexts: int) -> Array:
    """Return the levels of all contexts, uint8; :class:`ValueError` if the tables are damaged."""
    if not data:
        raise ValueError("a compact chunk has no tables")
    levels = np.zeros(contexts * SYMBOLS, np.int64)
    coded = np.frombuffer(bytearray(data[1:]), np.uint8)
    read = _code(False, coded, levels, (contexts, data[0] + 1))
    if read < coded.size:
        raise ValueError("a compact chunk has impossible tables")
    return levels.astype(np.uint8)


def _code(encoding: bool, data: Array, levels: Array, shape: tuple[int, int]) -> int:
    # Interpreted code is much faster on lists than on arrays, and their integers never overflow.
    listed = levels.tolist()
    one, other = [0] * COUNTERS, [0] * COUNTERS
    used: int = code_levels(encoding, data.data, listed, *shape, one, other, RATES.tolist())
    levels[:] = listed
    return used


def code_levels(
    encoding: Any,
    data: Any,
    levels: Any,
    contexts: Any,
    columns: Any,
    by_place: Any,
    by_neighbours: Any,
    rates: Any,
) -> Any:
    """Write ``levels`` to ``data``, or read them from it; return the number of bytes used.

    Returns -1 if a level that is read does not exist, or if far more is read than there is.
    """
    value, at = 0, 0
    if not encoding:
        for _ in range(4):
            value = value << 8 | (data[at] if at < len(data) else 0)
            at += 1
    coder = 0, 0xFFFFFFFF, value, at
    tables = data, by_place, by_neighbours, rates
    for context in range(contexts):
        row = context * 256
        above = row - 256 if context > 0 else row
        bit = 0
        if encoding:
            for symbol in range(columns):
                bit |= 1 if levels[row + symbol] > 0 else 0
        bit, coder = code_decision(encoding, bit, tables, 0, 0, coder)
        if not bit:
            continue
        last = _FIRST_LEVEL
        for symbol in range(columns):
            # The levels of the same symbol above, of two tokens farther above, of the token before,
            # and of the opposite direction. A row that is not yet read has zeros.
            up = levels[above + symbol]
            far = levels[above + symbol + 8] if symbol < 248 else 0
            left = levels[row + symbol - 4] if symbol >= 4 else 0
            twin = levels[row + symbol - 2] if symbol & 2 else 0
            if context == 0:
                up = far = 0
            there = (symbol & 3) + (4 if up > 0 else 0) + (8 if left > 0 else 0)
            there += (16 if far > 0 else 0) + (32 if twin > 0 else 0)
            level = levels[row + symbol] if encoding else 0
            bit = 1 if level > 0 else 0
            bit, coder = code_decision(encoding, bit, tables, 1 + symbol, 1 + there, coder)
            if not bit:
                continue
            near, column, kind = last, symbol, 2
            if twin > 0:
                near, column, kind = twin, symbol - 2, 0
            elif left > 0:
                near, column, kind = left, symbol - 4, 1
            slope = 16
            if kind < 2 and up > 0 and levels[above + column] > 0:
                slope = min(max(up - levels[above + column], -8), 7) + 8
            here, there = 257 + 32 * kind, 65 + 32 * slope
            step = level - near
            bit = 1 if step != 0 else 0
            bit, coder = code_decision(encoding, bit, tables, here, there, coder)
            if bit:
                down = 1 if step < 0 else 0
                down, coder = code_decision(encoding, down, tables, here + 1, there + 1, coder)
                size, length = (-step if down else step), 0
                while bit and length < _HIGHEST_LEVEL:
                    length += 1
                    bit = 1 if size > length else 0
                    place = 1 + min(length, 10) + 10 * down
                    bit, coder = code_decision(
                        encoding, bit, tables, here + place, there + place, coder
                    )
                step = -length if down else length
            else:
                step = 0
            last = near + step
            if not 0 < last <= _HIGHEST_LEVEL or (not encoding and coder[3] > len(data) + 8):
                return -1
            levels[row + symbol] = last
    bottom, top, value, at = coder
    if encoding:
        # Of the values between bottom and top that with most zeros at its end is the shortest.
        kept = 24
        while top >> kept << kept < bottom:
            kept -= 8
        value = top >> kept << kept
        for _ in range(4):
            data[at] = value >> 24
            value = value << 8 & 0xFFFFFFFF
            at += 1
    return at
