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
_BOUNDS = LEVELS[:-1] + LEVELS[1:]
"""A share of 2^19 belongs to the first level whose bound is above it, or else to the last one."""
_WEIGHTS = np.append(0, LEVELS)
"""Of each level plus 1; none of 0."""
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
    totals = histogram.reshape(-1, SYMBOLS).sum(axis=1)
    used = np.flatnonzero(histogram)
    scaled = (histogram[used] << 19) // totals[used >> 8]
    levels[used] = (np.searchsorted(_BOUNDS, scaled, side="right") + 1).astype(np.uint8)
    return levels


def frequencies(levels: Array) -> Array:
    """Return ``frequency << 16 | sum of those before``, uint32; each context's sum is 4096."""
    packed = np.zeros(levels.size, np.uint32)
    weights = _WEIGHTS[levels].reshape(-1, SYMBOLS)
    totals = weights.sum(axis=1)
    for context in np.flatnonzero(totals):
        used = np.flatnonzero(weights[context])
        shares = np.maximum((weights[context][used] << PROBABILITY_BITS) // totals[context], 1)
        rest = (1 << PROBABILITY_BITS) - shares.sum()
        while rest != 0:
            most = np.argmax(shares)
            change = max(rest, -(shares[most] // 2))
            shares[most] += change
            rest -= change
        before = np.cumsum(shares) - shares
        packed[context * SYMBOLS + used] = ((shares << 16) | before).astype(np.uint32)
    return packed


def slots_of(packed: Array) -> Array:
    """Return the symbol of each of a context's 4096 slots; uint8, shape (contexts * 4096,)."""
    slots = np.zeros(packed.size << 4, np.uint8)
    for index in np.flatnonzero(packed):
        share, before = np.int64(packed[index] >> 16), np.int64(packed[index] & 0xFFFF)
        start = (index >> 8 << PROBABILITY_BITS) + before
        slots[start : start + share] = index & 255
    return slots
