"""An interleaved range coder with fixed tables (rANS), in NumPy: the reference.

Many coders take turns, one a *lane*, so that a step over all lanes is a few array operations, and
compiled code (:mod:`msft_store.loops`) keeps several multiplications under way. Both give the same
words. ``docs/FORMAT.md``, section 5, has the steps; the method is J. Duda's (arXiv 1311.2540).

Example::

    words = encode(symbols, packed)              # symbols: context << 8 | symbol
    again, used = decode(words, contexts, packed, slots)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.tables import PROBABILITY_BITS

Array = NDArray[Any]

LOWEST = 1 << 16
"""Between two symbols a state is at least this and below 2^32."""
_SYMBOLS_PER_LANE = 1024
_MAX_LANES = 1024


def lanes_for(count: int) -> int:
    """Return how many coders share ``count`` symbols: a power of two, or 0."""
    if count == 0:
        return 0
    return 1 << min(max(count // _SYMBOLS_PER_LANE, 1), _MAX_LANES).bit_length() - 1


def encode(symbols: Array, packed: Array) -> Array:
    """Return uint16 words: two a lane for its state, high half first, then those of the symbols.

    ``symbols`` is uint16, ``context << 8 | symbol``; ``packed`` as of
    :func:`msft_store.tables.frequencies`.
    """
    lanes = lanes_for(symbols.size)
    state = np.full(lanes, LOWEST, np.uint64)
    parts: list[Array] = []
    for start in reversed(range(0, symbols.size, lanes or 1)):
        entry = packed[symbols[start : start + lanes]].astype(np.uint64)
        share, before = entry >> np.uint64(16), entry & np.uint64(0xFFFF)
        now = state[: entry.size]
        full = now >> np.uint64(32 - PROBABILITY_BITS) >= share
        parts.append(now[full].astype(np.uint16))
        now = np.where(full, now >> np.uint64(16), now)
        quotient = now // share
        state[: entry.size] = (
            (quotient << np.uint64(PROBABILITY_BITS)) + now - quotient * share + before
        )
    halves = np.stack([state >> np.uint64(16), state & np.uint64(0xFFFF)], axis=1)
    parts.append(halves.reshape(-1).astype(np.uint16))
    return np.concatenate(parts[::-1])


def decode(words: Array, contexts: Array, packed: Array, slots: Array) -> tuple[Array, int]:
    """Return the symbols, uint8, one a context, and how many words they took.

    ``words`` must go on for two words a lane and one a symbol, with anything.
    """
    lanes = lanes_for(contexts.size)
    halves = words[: 2 * lanes].astype(np.uint64).reshape(-1, 2)
    state = halves[:, 0] << np.uint64(16) | halves[:, 1]
    symbols = np.empty(contexts.size, np.uint8)
    used, mask = 2 * lanes, np.uint64((1 << PROBABILITY_BITS) - 1)
    for start in range(0, contexts.size, lanes or 1):
        context = contexts[start : start + lanes].astype(np.int64)
        now = state[: context.size]
        slot = now & mask
        symbol = slots[(context << PROBABILITY_BITS) + slot.astype(np.int64)]
        entry = packed[(context << 8) + symbol].astype(np.uint64)
        now = (entry >> np.uint64(16)) * (now >> np.uint64(PROBABILITY_BITS)) + slot
        now -= entry & np.uint64(0xFFFF)
        low = np.flatnonzero(now < LOWEST)
        now[low] = now[low] << np.uint64(16) | words[used : used + low.size]
        used += low.size
        state[: context.size] = now & np.uint64(0xFFFFFFFF)
        symbols[start : start + lanes] = symbol
    return symbols, used
