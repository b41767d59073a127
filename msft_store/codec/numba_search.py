"""The search for changes and for listed elements, compiled by Numba.

Indices are unsigned where Numba would otherwise test each for being negative. Nothing here checks
bounds: callers check sizes first.

Example::

    busy, low, high, skip, changes, listed = find_changes(new, old, shift, mask, fine, step)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, uint16, uint32, uint64

from msft_store.codec import rans
from msft_store.codec.bit_masks import (
    WORD,
    count_ones,
    count_trailing_zeros,
    mask_different,
    mask_most,
)
from msft_store.codec.changes import DIRECT_TOKENS, FIRST_CLASS
from msft_store.codec.numba_setup import compile_loop
from msft_store.codec.rans import BLOCK

_FEW = 4
"""Listed elements of a word that are written without a branch."""

plan_listing = compile_loop(rans.plan_listing)


@compile_loop
def count_exponents(
    old: Any, first: Any, changed: Any, exponents: Any, shift: Any, mask: Any, counts: Any
) -> Any:
    """Count the exponents of a full block's references, as of a kind of block.

    ``exponents`` is memory for one block.
    """
    bits, by, one = uint64(mask), uint64(shift), uint32(1)
    for i in range(BLOCK):
        exponents[i] = (old[first + uint64(i)] & bits) >> by
    # Four tables avoid that equal neighbours wait for each other's increment.
    table, kind = uint64(counts.size >> 2), uint64(rans.EXPONENTS if changed else 0)
    for i in range(0, BLOCK, 4):
        counts[kind + exponents[i]] += one
        counts[kind + table + exponents[i + 1]] += one
        counts[kind + table + table + exponents[i + 2]] += one
        counts[kind + table + table + table + exponents[i + 3]] += one


@compile_loop
def survey_blocks(new: Any, old: Any, words: Any, shift: Any, mask: Any, step: Any) -> Any:
    """See :func:`msft_store.codec.changes.survey_blocks`; fill ``words`` with masks of changes."""
    blocks, whole = words.size // 2, new.size // BLOCK
    changed = np.zeros(blocks, np.bool_)
    counts = np.zeros(4 * 3 * rans.EXPONENTS, np.uint32)
    exponents = np.empty(BLOCK, np.uint8)
    runs, before = 0, False
    for block in range(uint64(blocks)):
        first = block * uint64(BLOCK)
        if block < uint64(whole):
            low = mask_different(new, old, first)
            high = mask_different(new, old, first + uint64(WORD))
        else:
            low = high = uint64(0)
            for i in range(uint64(new.size) - first):
                differs = uint64(new[first + i] != old[first + i]) << (i & uint64(WORD - 1))
                if i < uint64(WORD):
                    low |= differs
                else:
                    high |= differs
        words[uint64(2) * block], words[uint64(2) * block + uint64(1)] = low, high
        differs = (low | high) != uint64(0)
        changed[block] = differs
        runs += differs != before
        before = differs
        if block % uint64(step) == uint64(0):
            if block < uint64(whole):
                count_exponents(old, first, differs, exponents, shift, mask, counts)
            else:
                for i in range(first, uint64(new.size)):
                    exponent = uint64((old[i] & uint64(mask)) >> uint64(shift))
                    counts[uint64(rans.EXPONENTS if differs else 0) + exponent] += uint32(1)
            for part in range(uint64(2)):
                bits = high if part else low
                while bits != uint64(0):
                    i = first + uint64(WORD) * part + count_trailing_zeros(bits)
                    exponent = uint64((old[i] & uint64(mask)) >> uint64(shift))
                    counts[uint64(2 * rans.EXPONENTS) + exponent] += uint32(1)
                    bits &= bits - uint64(1)
    # Numba takes seconds to compile a sum along an axis.
    sums = np.zeros((3, rans.EXPONENTS), np.int64)
    for i in range(counts.size):
        sums[(i // rans.EXPONENTS) % 3, i % rans.EXPONENTS] += counts[i]
    return changed, sums, runs


@compile_loop
def mark_busy(old: Any, words: Any, blocks: Any, busy: Any, most: Any, mask: Any) -> Any:
    """Add busy elements to the masks of changes; return the number of all that are marked.

    Elements of at most the magnitude ``most`` are busy if ``busy`` is True. Blocks that are not
    coded have neither.
    """
    count, size = uint64(0), uint64(old.size)
    for word in range(uint64(words.size)):
        if busy and blocks[word >> uint64(1)]:
            first = word * uint64(WORD)
            if first + uint64(WORD) <= size:
                words[word] |= mask_most(old, first, mask, most)
            else:
                for i in range(first, size):
                    words[word] |= uint64((old[i] & mask) <= most) << (i - first)
        count += count_ones(words[word])
    return count


@compile_loop
def list_elements(new: Any, old: Any, words: Any, count: Any) -> Any:
    """Return the positions (uint32), references and values of the ``count`` marked elements."""
    positions = np.empty(count + uint64(_FEW), np.uint32)
    references, values = np.empty(count, old.dtype), np.empty(count, new.dtype)
    found, one = uint64(0), uint64(1)
    for word in range(uint64(words.size)):
        marked = words[word]
        first, more = word * uint64(WORD), found + count_ones(marked)
        # Few branches, because the processor cannot predict the number of bits.
        for _ in range(_FEW):
            positions[found] = first + count_trailing_zeros(marked)
            found += one
            marked &= marked - one
        while marked != 0:
            positions[found] = first + count_trailing_zeros(marked)
            found += one
            marked &= marked - one
        found = more
    for k in range(count):
        references[k], values[k] = old[positions[k]], new[positions[k]]
    return positions[:count], references, values


@compile_loop
def compute_gaps(references: Any, positions: Any, blocks: Any, limit: Any, mask: Any) -> Any:
    """Return the gaps (uint32) between quiet elements of a list, in the marked blocks only."""
    skipped, start = 0, 0
    gaps = np.empty(positions.size, np.uint32)
    count, before = uint64(0), -1
    for k in range(positions.size):
        if (references[k] & mask) >= limit:
            position = int64(positions[k])
            while start < position // BLOCK:
                skipped += not blocks[start]
                start += 1
            place = position - BLOCK * skipped
            gaps[count] = place - before - 1
            count, before = count + uint64(1), place
    return gaps[:count].copy()


@compile_loop
def encode_runs(blocks: Any, runs: Any) -> Any:
    """See :func:`msft_store.codec.changes.encode_runs`; ``runs`` is their number."""
    lengths = np.empty(runs, np.int64)
    count, begin, before = 0, 0, False
    for block in range(blocks.size):
        if blocks[block] != before:
            lengths[count] = block - begin
            count, begin, before = count + 1, block, blocks[block]
    return lengths


@compile_loop
def compute_symbols(
    values: Any, references: Any, shift: Any, mask: Any, fine: Any, low: Any, high: Any
) -> Any:
    """See :func:`msft_store.codec.changes.compute_symbols`."""
    symbols = np.empty(values.size, np.uint16)
    distances = np.empty(values.size, np.uint32)
    least = (1025 << fine) - DIRECT_TOKENS
    for k in range(values.size):
        before, after = int64(references[k]), int64(values[k])
        was, now = before & mask, after & mask
        change = now - was
        negative = change >> 63
        distance = (change ^ negative) - negative
        part = int64(np.float64(distance).view(np.int64) >> (52 - fine)) - least
        token = distance if distance < DIRECT_TOKENS else part
        context = min(max(was >> shift, low), high) - low + FIRST_CLASS
        context = context if was != 0 else high - low + 1 + FIRST_CLASS
        flipped = int64((before ^ after) & (mask + 1) != 0)
        symbols[k] = uint16(context << 8 | token << 2 | (negative & 2) | flipped)
        distances[k] = uint32(distance)
    return symbols, distances


@compile_loop
def find_changes(new: Any, old: Any, shift: Any, mask: Any, fine: Any, step: Any) -> Any:
    """See :func:`msft_store.codec.changes.find_changes`.

    Returns ``busy``, ``low``, ``high``, whether blocks are skipped, the lengths of their runs, the
    gaps, symbols and distances, and positions, references and values of the listed elements.
    """
    words = np.empty(2 * -(-new.size // BLOCK), np.uint64)
    changed, counts, runs = survey_blocks(new, old, words, shift, mask, step)
    skip, busy, low, high = plan_listing(counts, runs, step)
    lengths = encode_runs(changed, runs) if skip else np.empty(0, np.int64)
    blocks = changed if skip else np.ones(changed.size, np.bool_)
    limit = busy << shift
    bounds = np.empty(2, old.dtype)
    bounds[0], bounds[1] = max(min(limit - 1, mask), 0), mask
    count = mark_busy(old, words, blocks, busy > 0, bounds[0], bounds[1])
    positions, references, values = list_elements(new, old, words, count)
    gaps = compute_gaps(references, positions, blocks, limit, mask)
    symbols, distances = compute_symbols(values, references, shift, mask, fine, low, high)
    changes = (lengths, gaps, symbols, distances)
    return busy, low, high, skip, changes, (positions, references, values)


@compile_loop
def locate_listed(
    old: Any, blocks: Any, busy: Any, most: Any, mask: Any, gaps: Any, count: Any
) -> Any:
    """Return the positions of busy elements and of quiet ones in the marked blocks.

    Elements of at most the magnitude ``most`` are busy if ``busy`` is True. ``gaps`` counts
    elements of these blocks only. The result has another length than ``count`` if they do not fit.
    """
    positions = np.empty(count + BLOCK + _FEW, np.uint32)
    one, width, half = uint64(1), uint64(BLOCK), uint64(WORD)
    whole, found, start = uint64(old.size // BLOCK), uint64(0), uint64(0)
    reached, quiet = uint64(0), uint64(0)
    if gaps.size > 0:
        quiet = uint64(gaps[0])
    for block in range(uint64(blocks.size)):
        if not blocks[block]:
            continue
        if found > uint64(count):
            break
        first = uint64(block) * width
        length = width if block < whole else uint64(old.size) - first
        for at in range(uint64(0), length, half):
            listed = uint64(0)
            if busy and block < whole:
                listed = mask_most(old, first + at, mask, most)
            elif busy:
                for i in range(min(half, length - at)):
                    listed |= uint64((old[first + at + i] & mask) <= most) << uint64(i)
            end = start + min(at + half, length)
            while reached < uint64(gaps.size) and quiet < end:
                listed |= one << (quiet - start - at)
                reached += one
                if reached < uint64(gaps.size):
                    quiet += uint64(gaps[reached]) + one
            # Few branches, because the processor cannot predict the number of bits.
            more = found + count_ones(listed)
            for _ in range(_FEW):
                positions[found] = first + at + count_trailing_zeros(listed)
                found += one
                listed &= listed - one
            while listed != 0:
                positions[found] = first + at + count_trailing_zeros(listed)
                found += one
                listed &= listed - one
            found = more
        start += width
    fits = reached == uint64(gaps.size) and found == uint64(count)
    return positions[: count if fits else count + 1]
