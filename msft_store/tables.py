"""Small decisions of the class codec, in integers alone: its plan and its frequency tables.

Written as plain loops, so that the same source runs compiled (:mod:`msft_store.loops`) and
interpreted, and gives the same bytes on every machine. The formulas are in ``docs/FORMAT.md``,
section 5; what :func:`plan` decides is the encoder's choice and stands in the payload.

Example::

    blocks, busy, low, high = plan(counts, runs, step)
    levels = levels_of(histogram)
    packed = frequencies(levels)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 128
"""Lanes of a block; blocks without any change are left out where that pays."""
SYMBOLS = 256
"""Symbols of one table."""
EXPONENTS = 256
MAX_CLASSES = 64
PROBABILITY_BITS = 12
LEVELS = np.array([(64, 76, 91, 108)[j % 4] << j // 4 for j in range(49)], np.int64)
"""Weights a quarter of an octave apart; a symbol's frequency is kept as one of them."""
RUN_BITS = 4
"""What one run of blocks costs at least, in expected changes that it must save."""
CLASS_ELEMENTS = 128
"""Classes with fewer elements are merged with their neighbour."""
_SAMPLED_BLOCKS = 256
_SAMPLING = 8


def sampling(blocks: int) -> int:
    """Return how far apart the blocks are that a plan counts."""
    return _SAMPLING if blocks >= _SAMPLED_BLOCKS else 1


def plan(counts: Array, runs: int, step: int) -> tuple[bool, int, int, int]:
    """Return (leave out unchanged blocks, busy exponents below, lowest class, highest class).

    ``counts``, int64 of shape (3, 256), holds for each exponent of the reference the elements of
    unchanged blocks, those of changed blocks, and those that changed, of every ``step``-th block;
    ``runs`` is how often a run of changed or unchanged blocks begins.
    """
    expected = 0
    for e in range(EXPONENTS):
        total = counts[0, e] + counts[1, e]
        if total > 0:
            expected += counts[0, e] * counts[2, e] // total
    blocks = step * expected > RUN_BITS * runs
    busy = 0
    listed = 0
    for e in range(EXPONENTS):
        seen = counts[1, e] if blocks else counts[0, e] + counts[1, e]
        if counts[2, e] >= 4 and 8 * counts[2, e] >= seen:
            busy = e + 1
    low, high = -1, 0
    for e in range(EXPONENTS):
        seen = counts[1, e] if blocks else counts[0, e] + counts[1, e]
        listed += step * (seen if e < busy else counts[2, e])
        if low < 0 and listed >= CLASS_ELEMENTS:
            low = e
    if low < 0:
        return blocks, busy, 0, 0
    above = 0
    for k in range(EXPONENTS):
        e = EXPONENTS - 1 - k
        seen = counts[1, e] if blocks else counts[0, e] + counts[1, e]
        above += step * (seen if e < busy else counts[2, e])
        if above >= CLASS_ELEMENTS:
            high = e
            break
    high = max(low, min(high, low + MAX_CLASSES - 1))
    return blocks, busy, low, high


def levels_of(histogram: Array) -> Array:
    """Return each symbol's level plus 1, or 0 if it does not occur; uint8, shape as given.

    ``histogram`` is int64 of shape (contexts * 256,).
    """
    levels = np.zeros(histogram.size, np.uint8)
    for first in range(0, histogram.size, SYMBOLS):
        total = 0
        for s in range(first, first + SYMBOLS):
            total += histogram[s]
        for s in range(first, first + SYMBOLS):
            if histogram[s] > 0:
                scaled = histogram[s] << 19
                j = 0
                while j < 48 and scaled >= (LEVELS[j] + LEVELS[j + 1]) * total:
                    j += 1
                levels[s] = j + 1
    return levels


def frequencies(levels: Array) -> Array:
    """Return ``frequency << 16 | sum of those before``, uint32; each context's sum is 4096."""
    packed = np.zeros(levels.size, np.uint32)
    for first in range(0, levels.size, SYMBOLS):
        total = 0
        for s in range(first, first + SYMBOLS):
            if levels[s] > 0:
                total += LEVELS[levels[s] - 1]
        if total == 0:
            continue
        rest = 1 << PROBABILITY_BITS
        for s in range(first, first + SYMBOLS):
            if levels[s] > 0:
                share = max(1, (LEVELS[levels[s] - 1] << PROBABILITY_BITS) // total)
                packed[s] = share
                rest -= share
        while rest != 0:
            best = first
            for s in range(first, first + SYMBOLS):
                if packed[s] > packed[best]:
                    best = s
            most = np.int64(packed[best])
            change = max(rest, -(most // 2))
            packed[best] = most + change
            rest -= change
        before = 0
        for s in range(first, first + SYMBOLS):
            share = np.int64(packed[s])
            if share > 0:
                packed[s] = (share << 16) | before
                before += share
    return packed


def slots_of(packed: Array) -> Array:
    """Return the symbol of each of a context's 4096 slots; uint8, shape (contexts * 4096,)."""
    slots = np.zeros(packed.size << 4, np.uint8)
    for index in range(packed.size):
        share = np.int64(packed[index]) >> 16
        start = ((index >> 8) << 12) + (np.int64(packed[index]) & 0xFFFF)
        for slot in range(start, start + share):
            slots[slot] = index & 255
    return slots
