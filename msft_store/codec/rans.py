"""Codec 6's entropy coder: the plan, the frequency tables and an interleaved rANS range coder.

The method is J. Duda's (arXiv 1311.2540); ``docs/FORMAT.md``, section 5, has the formulas. Many
coders take turns, so that one step over all coders is a few array operations, and compiled code
(:mod:`msft_store.codec.numba_kernels`) keeps several multiplications in flight. Both give the same
words. Plan and tables use integers only, so every machine gives the same bytes; the source of the
plan runs compiled and interpreted. The plan is the encoder's choice, and the payload states it.

Example::

    skip, busy, low, high = plan_listing(counts, runs, step)
    packed = compute_frequencies(compute_levels(histogram))
    coders = count_coders(symbols.size)
    words = encode(symbols, packed, coders)      # symbols: context << 8 | symbol
    decoded, used = decode(words, contexts, packed, build_slots(packed), coders)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 128
"""Lanes of a block; blocks without any change are skipped if that saves space."""
SYMBOLS = 256
"""Number of symbols of one table."""
EXPONENTS = 256
MAX_CLASSES = 64
PROBABILITY_BITS = 12
LEVELS = np.array([(64, 76, 91, 108)[j % 4] << j // 4 for j in range(49)], np.int64)
"""Weights a quarter of an octave apart; tables store a symbol's frequency as one of them."""
BOUNDS = LEVELS[:-1] + LEVELS[1:]
"""A share of 2^19 gets the first level whose bound is above it, or else the last level."""
WEIGHTS = np.append(0, LEVELS)
"""The weight of each level plus 1; 0 means that a symbol does not occur."""
MIN_CHANGES_PER_RUN = 4
"""Expected changes that skipping must save for each run of blocks that it costs."""
MIN_CLASS_ELEMENTS = 128
"""Exponents with fewer elements share a context with their neighbour."""
_SAMPLED_BLOCKS = 256
_SAMPLING_STEP = 8


def sampling_step(blocks: int) -> int:
    """Return the distance between the blocks that a plan counts."""
    return _SAMPLING_STEP if blocks >= _SAMPLED_BLOCKS else 1


def plan_listing(counts: Array, runs: int, step: int) -> tuple[bool, int, int, int]:
    """Return whether to skip unchanged blocks, the limit of busy exponents, ``low`` and ``high``.

    ``counts`` (int64, shape (3, 256)) holds for each exponent of the reference, in every
    ``step``-th block, the elements of unchanged blocks, those of changed blocks and the changed
    elements. ``runs`` is the number of runs of changed or unchanged blocks.
    """
    expected = 0
    for e in range(EXPONENTS):
        total = counts[0, e] + counts[1, e]
        if total > 0:
            expected += counts[0, e] * counts[2, e] // total
    blocks = step * expected > MIN_CHANGES_PER_RUN * runs
    busy = 0
    listed = 0
    for e in range(EXPONENTS):
        seen = counts[1, e] if blocks else counts[0, e] + counts[1, e]
        if counts[2, e] >= 4 and 16 * counts[2, e] >= seen:
            busy = e + 1
    low, high = -1, 0
    for e in range(EXPONENTS):
        seen = counts[1, e] if blocks else counts[0, e] + counts[1, e]
        listed += step * (seen if e < busy else counts[2, e])
        if low < 0 and listed >= MIN_CLASS_ELEMENTS:
            low = e
    if low < 0:
        return blocks, busy, 0, 0
    above = 0
    for k in range(EXPONENTS):
        e = EXPONENTS - 1 - k
        seen = counts[1, e] if blocks else counts[0, e] + counts[1, e]
        above += step * (seen if e < busy else counts[2, e])
        if above >= MIN_CLASS_ELEMENTS:
            high = e
            break
    # References of zero may be far below all others, which matter more.
    low = max(low, high - MAX_CLASSES + 1)
    return blocks, busy, low, max(low, high)


def compute_levels(histogram: Array) -> Array:
    """Return each symbol's level plus 1 (uint8), or 0 if the symbol does not occur.

    ``histogram`` is int64 of shape (contexts * 256,).
    """
    levels = np.zeros(histogram.size, np.uint8)
    totals = histogram.reshape(-1, SYMBOLS).sum(axis=1)
    used = np.flatnonzero(histogram)
    shares = (histogram[used] << 19) // totals[used >> 8]
    levels[used] = (np.searchsorted(BOUNDS, shares, side="right") + 1).astype(np.uint8)
    return levels


def compute_frequencies(levels: Array) -> Array:
    """Return ``frequency << 16 | sum of those before`` (uint32); each context sums up to 4096."""
    packed = np.zeros(levels.size, np.uint32)
    weights = WEIGHTS[levels].reshape(-1, SYMBOLS)
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


def build_slots(packed: Array) -> Array:
    """Return the symbol of each of a context's 4096 slots; uint8, shape (contexts * 4096,)."""
    slots = np.zeros(packed.size << 4, np.uint8)
    for index in np.flatnonzero(packed):
        share, before = np.int64(packed[index] >> 16), np.int64(packed[index] & 0xFFFF)
        start = (index >> 8 << PROBABILITY_BITS) + before
        slots[start : start + share] = index & 255
    return slots


MIN_STATE = 1 << 16
"""Between two symbols a state is at least this, and below 2^32."""
_SLOT = (1 << PROBABILITY_BITS) - 1
_FEW_CODERS = 8
"""Number of coders up to which Python's integers are faster than arrays."""
_SYMBOLS_PER_CODER = 1024
_MAX_CODERS = 1024


def count_coders(count: int, *, each: int = _SYMBOLS_PER_CODER, most: int = _MAX_CODERS) -> int:
    """Return the number of coders that share ``count`` symbols: a power of two, or 0."""
    return 1 << min(max(count // each, 1), most).bit_length() - 1 if count else 0


def encode(symbols: Array, packed: Array, coders: int) -> Array:
    """Return uint16 words: the state of each coder, high half first, then the words of symbols.

    ``symbols`` is uint16, ``context << 8 | symbol``; ``packed`` as of :func:`compute_frequencies`.
    """
    entries = packed[symbols]
    if coders <= _FEW_CODERS:
        return _encode_few(entries.tolist(), coders)
    steps = -(-symbols.size // coders)
    # The padding is coded as certain symbols, which change no state.
    rows = np.full((steps, coders), 1 << 16 + PROBABILITY_BITS, np.uint32)
    rows.reshape(-1)[: entries.size] = entries
    shares, before = rows >> 16, rows & 0xFFFF
    limits = (shares.astype(np.uint64) << 32 - PROBABILITY_BITS) - np.uint64(1)
    full, states = np.empty((steps, coders), bool), np.empty((steps, coders), np.uint32)
    state, quotient, rest = np.full((3, coders), MIN_STATE, np.uint32)
    turns = zip(shares, before, limits.astype(np.uint32), full, states, strict=True)
    for share, start, limit, is_full, was in reversed(list(turns)):
        np.greater(state, limit, out=is_full)
        was[:] = state
        np.right_shift(state, 16, out=state, where=is_full)
        np.divmod(state, share, out=(quotient, rest))
        np.left_shift(quotient, PROBABILITY_BITS, out=quotient)
        np.add(quotient, rest, out=state)
        np.add(state, start, out=state)
    halves = np.stack([state >> 16, state], axis=1).reshape(-1)
    words: Array = np.concatenate([halves, states[full]]).astype(np.uint16)
    return words


def _encode_few(entries: list[int], coders: int) -> Array:
    state, words = [MIN_STATE] * coders, []
    for i in range(len(entries) - 1, -1, -1):
        share, now, coder = entries[i] >> 16, state[i % coders], i % coders
        if now >> 32 - PROBABILITY_BITS >= share:
            words.append(now & 0xFFFF)
            now >>= 16
        state[coder] = (now // share << PROBABILITY_BITS) + now % share + (entries[i] & 0xFFFF)
    for now in reversed(state):
        words += [now & 0xFFFF, now >> 16]
    return np.array(words[::-1], np.uint16)


def decode(
    words: Array, contexts: Array, packed: Array, slots: Array, coders: int
) -> tuple[Array, int]:
    """Return one symbol (uint8) for each context, and the number of words that they took.

    ``words`` must be padded to two words for each coder and one for each symbol.
    """
    if coders <= _FEW_CODERS:
        lists = words.tolist(), contexts.tolist(), packed.tolist()
        return _decode_few(*lists, slots.tobytes(), coders)
    given = words.astype(np.int64)
    state = given[: 2 * coders : 2] << 16 | given[1 : 2 * coders : 2]
    numbers = np.arange(slots.size)
    entries = packed[(numbers >> PROBABILITY_BITS << 8) + slots].astype(np.int64)
    shares, biases = entries >> 16, (numbers & _SLOT) - (entries & 0xFFFF)
    chosen = contexts.astype(np.int64) << PROBABILITY_BITS
    used, factor = 2 * coders, np.empty(coders, np.int64)
    for start in range(0, chosen.size, coders):
        slot = chosen[start : start + coders]
        if slot.size < coders:
            state, factor = state[: slot.size], factor[: slot.size]
        np.bitwise_and(state, _SLOT, out=factor)
        np.add(slot, factor, out=slot)
        shares.take(slot, out=factor, mode="clip")
        np.right_shift(state, PROBABILITY_BITS, out=state)
        np.multiply(state, factor, out=state)
        biases.take(slot, out=factor, mode="clip")
        np.add(state, factor, out=state)
        low = (state < MIN_STATE).nonzero()[0]
        state[low] = state[low] << 16 | given[used : used + low.size]
        used += low.size
    symbols: Array = slots[chosen]
    return symbols, used


def _decode_few(
    words: list[int], contexts: list[int], packed: list[int], slots: bytes, coders: int
) -> tuple[Array, int]:
    state = [words[2 * coder] << 16 | words[2 * coder + 1] for coder in range(coders)]
    symbols, used = bytearray(len(contexts)), 2 * coders
    for i, context in enumerate(contexts):
        now = state[i % coders]
        slot = now & _SLOT
        symbol = slots[(context << PROBABILITY_BITS) + slot]
        entry = packed[(context << 8) + symbol]
        now = (entry >> 16) * (now >> PROBABILITY_BITS) + slot - (entry & 0xFFFF)
        if now < MIN_STATE:
            now = now << 16 | words[used]
            used += 1
        state[i % coders] = now
        symbols[i] = symbol
    return np.frombuffer(symbols, np.uint8), used
