"""The kernels of codecs 6, 7 and 9, compiled by Numba; importing this module takes half a second.

They return what :mod:`msft_store.codec.changes`, :mod:`msft_store.codec.kernels` and
:mod:`msft_store.codec.rans` return, many times as fast. They release the GIL, and are compiled once
on each machine. Indices are unsigned where Numba would otherwise test each for being negative.
Nothing here checks bounds: callers check sizes first.

Example::

    from msft_store.codec.codecs import compiled_kernels
    compiled = compiled_kernels()                    # this module, or None without Numba
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np
from numba import int64, njit, uint16, uint32, uint64

from msft_store.codec import arithmetic_coder, rans, table_coder
from msft_store.codec.bit_masks import WORD, count_ones, count_trailing_zeros, mask_most
from msft_store.codec.changes import DIRECT_TOKENS, FIRST_CLASS
from msft_store.codec.rans import BLOCK, MIN_STATE, PROBABILITY_BITS

_F = TypeVar("_F", bound=Callable[..., Any])
_INVERSE_SLACK = 1 + 2.0**-50
"""Keeps the product with an inverse from falling below the quotient of an exact multiple."""
_GATHER = 0x0102040810204080
_SEQUENCE = 0x03F79D71B4CB0A89
"""A de Bruijn sequence: its products with powers of two differ in the highest six bits."""
_BIT_NUMBERS = np.zeros(64, np.uint8)
for _number in range(64):
    _BIT_NUMBERS[(_SEQUENCE << _number) % 2**64 >> 58] = _number
_FEW = 4
"""Listed elements of a word that are written without a branch."""
_BATCH = 1024
"""Elements at a time, so that the buffers stay in the first-level cache."""
_TARGET_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
"""Variables of the environment that select the processor to compile for."""


def _compile(function: _F) -> _F:
    try:
        compiled: Any = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        # Without a directory for the cache, each process compiles the kernels again.
        compiled = njit(nogil=True, error_model="numpy")(function)
    return cast("_F", compiled)


def cache_folder() -> str | None:
    """Return the folder in which Numba keeps these kernels; ``None`` if it keeps nothing."""
    stats = getattr(encode, "stats", None)
    return None if stats is None else stats.cache_path


def describe_target() -> str:
    """Return what Numba's cache depends on besides the sources: the processor and versions."""
    processor = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features()
    chosen = [os.environ.get(name) for name in _TARGET_VARIABLES]
    return f"{numba.__version__} {processor[0]} {processor[1].flatten()} {chosen}"


def _rebind_globals(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """Return a copy of a function with some of its global names bound to other objects."""
    known = {**function.__globals__, **names}
    return FunctionType(function.__code__, known, function.__name__)


plan_listing = _compile(rans.plan_listing)
build_slots = _compile(rans.build_slots)

code_decision = njit(inline="always", error_model="numpy")(arithmetic_coder.code_decision)
code_symbols = _compile(_rebind_globals(arithmetic_coder.code_symbols, code_decision=code_decision))
code_levels = _compile(_rebind_globals(table_coder.code_levels, code_decision=code_decision))


@_compile
def count_block(
    new: Any, old: Any, exponents: Any, kind: Any, shift: Any, mask: Any, counts: Any
) -> Any:
    """Count the exponents of a block's elements, as of a kind of block, and of the changed ones.

    ``exponents`` is memory for one block.
    """
    bits, by, one = uint64(mask), uint64(shift), uint32(1)
    for i in range(old.size):
        exponents[i] = (old[i] & bits) >> by
    # Four tables avoid that equal neighbours wait for each other's increment.
    table = uint64(counts.size >> 2)
    for i in range(0, old.size - 3, 4):
        counts[kind + exponents[i]] += one
        counts[kind + table + exponents[i + 1]] += one
        counts[kind + table + table + exponents[i + 2]] += one
        counts[kind + table + table + table + exponents[i + 3]] += one
    for i in range(old.size & ~3, old.size):
        counts[kind + exponents[i]] += one
    if kind > 0:
        for i in range(old.size):
            counts[uint64(2 * rans.EXPONENTS) + exponents[i]] += uint32(new[i] != old[i])


@_compile
def survey_blocks(
    new: Any, old: Any, new_words: Any, old_words: Any, shift: Any, mask: Any, step: Any
) -> Any:
    """See :func:`msft_store.codec.changes.survey_blocks`; words view the full blocks as uint64."""
    blocks, whole = -(-new.size // BLOCK), new.size // BLOCK
    changed = np.zeros(blocks, np.bool_)
    counts = np.zeros(4 * 3 * rans.EXPONENTS, np.uint32)
    width = new_words.size // whole if whole > 0 else 0
    exponents = np.empty(BLOCK, np.uint8)
    runs, before = 0, False
    for block in range(blocks):
        first, differs = block * BLOCK, uint64(0)
        if block < whole:
            start = block * width
            for i in range(width):
                differs |= new_words[start + i] ^ old_words[start + i]
        else:
            for i in range(first, new.size):
                differs |= uint64(new[i] ^ old[i])
        changed[block] = differs != 0
        runs += changed[block] != before
        before = changed[block]
        if block % step == 0:
            now, was = new[first : first + BLOCK], old[first : first + BLOCK]
            kind = uint64(rans.EXPONENTS) if changed[block] else uint64(0)
            count_block(now, was, exponents, kind, shift, mask, counts)
    sums = counts.reshape(4, 3, rans.EXPONENTS).astype(np.int64).sum(axis=0)
    return changed, sums, runs


@_compile
def append_marked(words: Any, first: Any, positions: Any, count: Any) -> Any:
    """Append the positions of a block's marks to ``count`` others; return how many there are.

    ``words`` views one byte for each element as uint64: 1 if it is marked, else 0.
    """
    one, byte = uint64(1), uint64(8)
    for half in range(0, words.size, 8):
        bits = uint64(0)
        for i in range(8):
            # The product moves the lowest bit of each byte into the highest byte.
            gathered = (words[half + i] * uint64(_GATHER)) >> uint64(56)
            bits |= gathered << (byte * uint64(i))
        start = uint64(first) + byte * uint64(half)
        while bits != uint64(0):
            lowest = bits & (uint64(0) - bits)
            positions[count] = start + uint64(
                _BIT_NUMBERS[(lowest * uint64(_SEQUENCE)) >> uint64(58)]
            )
            count += one
            bits ^= lowest
    return count


@_compile
def list_elements(new: Any, old: Any, blocks: Any, busy: Any, most: Any, mask: Any) -> Any:
    """List changed and busy elements in the marked blocks, while these are in the cache.

    Returns their positions (uint32), references and values. Elements of at most the magnitude
    ``most`` are busy if ``busy`` is True.
    """
    positions = np.empty(new.size + 1, np.uint32)
    references, values = np.empty(new.size, old.dtype), np.empty(new.size, new.dtype)
    marks = np.zeros(BLOCK, np.uint8)
    words = marks.view(np.uint64)
    count, whole = uint64(0), uint64(new.size // BLOCK)
    for block in range(uint64(blocks.size)):
        if not blocks[block]:
            continue
        first = uint64(block) * uint64(BLOCK)
        # The loops of full blocks have a constant length, so that the compiler vectorises them.
        if block >= whole:
            marks[:] = 0
            for i in range(uint64(new.size) - first):
                was = old[first + uint64(i)]
                marks[i] = (new[first + uint64(i)] != was) | (busy & ((was & mask) <= most))
        elif busy:
            for i in range(BLOCK):
                was = old[first + uint64(i)]
                marks[i] = (new[first + uint64(i)] != was) | ((was & mask) <= most)
        else:
            for i in range(BLOCK):
                marks[i] = new[first + uint64(i)] != old[first + uint64(i)]
        begin, count = count, append_marked(words, first, positions, count)
        for k in range(begin, count):
            references[k], values[k] = old[positions[k]], new[positions[k]]
    return positions[:count].copy(), references[:count].copy(), values[:count].copy()


@_compile
def compute_gaps(references: Any, positions: Any, blocks: Any, limit: Any, mask: Any) -> Any:
    """Return the gaps (int64) between quiet elements of a list, in the marked blocks only."""
    skipped, start = 0, 0
    gaps = np.empty(positions.size, np.int64)
    count, before = 0, -1
    for k in range(positions.size):
        position = int64(positions[k])
        if (references[k] & mask) >= limit:
            while start < position // BLOCK:
                skipped += not blocks[start]
                start += 1
            place = position - BLOCK * skipped
            gaps[count] = place - before - 1
            count, before = count + 1, place
    return gaps[:count]


@_compile
def encode_runs(blocks: Any, runs: Any) -> Any:
    """See :func:`msft_store.codec.changes.encode_runs`; ``runs`` is their number."""
    lengths = np.empty(runs, np.int64)
    count, begin, before = 0, 0, False
    for block in range(blocks.size):
        if blocks[block] != before:
            lengths[count] = block - begin
            count, begin, before = count + 1, block, blocks[block]
    return lengths


@_compile
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


@_compile
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


@_compile
def find_changes(
    new: Any, old: Any, new_words: Any, old_words: Any, shift: Any, mask: Any, fine: Any, step: Any
) -> Any:
    """See :func:`msft_store.codec.changes.find_changes`; words view the full blocks as uint64.

    Returns ``busy``, ``low``, ``high``, whether blocks are skipped, the lengths of their runs, the
    gaps, symbols and distances, and positions, references and values of the listed elements.
    """
    changed, counts, runs = survey_blocks(new, old, new_words, old_words, shift, mask, step)
    skip, busy, low, high = plan_listing(counts, runs, step)
    lengths = encode_runs(changed, runs) if skip else np.empty(0, np.int64)
    blocks = changed if skip else np.ones(changed.size, np.bool_)
    limit = busy << shift
    bounds = np.empty(2, old.dtype)
    bounds[0], bounds[1] = max(min(limit - 1, mask), 0), mask
    # Without busy elements, only changed blocks have anything to list.
    searched = blocks if busy > 0 else changed
    positions, references, values = list_elements(
        new, old, searched, busy > 0, bounds[0], bounds[1]
    )
    gaps = compute_gaps(references, positions, blocks, limit, mask)
    symbols, distances = compute_symbols(values, references, shift, mask, fine, low, high)
    changes = (lengths, gaps, symbols, distances)
    return busy, low, high, skip, changes, (positions, references, values)


@_compile
def write_low_bits(
    symbols: Any, distances: Any, bits: Any, histogram: Any, words: Any, start: Any
) -> Any:
    """See :func:`msft_store.codec.kernels.write_low_bits`."""
    tokens = uint16(bits.size - 1)
    other = np.zeros(histogram.size, np.int64)
    used, one = uint64(start >> 5), uint64(1)
    buffer, filled = uint64(words[used]), uint64(start & 31)
    for k in range(symbols.size):
        symbol = symbols[k]
        # Two histograms avoid that equal neighbours wait for each other's increment.
        if k & 1:
            histogram[symbol] += 1
        else:
            other[symbol] += 1
        count = uint64(bits[(symbol >> uint16(2)) & tokens])
        buffer |= (uint64(distances[k]) & ((one << count) - one)) << filled
        filled += count
        if filled >= uint64(32):
            words[used] = uint32(buffer)
            used += one
            buffer >>= uint64(32)
            filled -= uint64(32)
    words[used] = uint32(buffer)
    for i in range(other.size):
        histogram[i] += other[i]
    return 32 * int64(used) + int64(filled)


@_compile
def compute_frequencies(levels: Any) -> Any:
    """See :func:`msft_store.codec.rans.compute_frequencies`."""
    packed = np.zeros(levels.size, np.uint32)
    used, shares = np.empty(rans.SYMBOLS, np.int64), np.empty(rans.SYMBOLS, np.int64)
    for first in range(0, levels.size, rans.SYMBOLS):
        count, total = 0, 0
        for i in range(first, first + rans.SYMBOLS):
            if levels[i] > 0:
                used[count], shares[count] = i, rans.WEIGHTS[levels[i]]
                total += shares[count]
                count += 1
        rest = 1 << PROBABILITY_BITS if count > 0 else 0
        for k in range(count):
            shares[k] = max((shares[k] << PROBABILITY_BITS) // total, 1)
            rest -= shares[k]
        while rest != 0:
            most = 0
            for k in range(1, count):
                if shares[k] > shares[most]:
                    most = k
            change = max(rest, -(shares[most] // 2))
            shares[most] += change
            rest -= change
        before = 0
        for k in range(count):
            packed[used[k]] = shares[k] << 16 | before
            before += shares[k]
    return packed


@_compile
def encode(symbols: Any, packed: Any, coders: Any) -> Any:
    """See :func:`msft_store.codec.rans.encode`."""
    inverse = np.empty(packed.size, np.float64)
    for i in range(packed.size):
        share = packed[i] >> uint32(16)
        inverse[i] = _INVERSE_SLACK / share if share > 0 else 0.0
    words = np.empty(symbols.size + 2 * coders + 1, np.uint16)
    state = np.full(coders, MIN_STATE, np.uint32)
    at, last, one = uint64(words.size - 1), uint64(coders - 1), uint64(1)
    left = uint64(symbols.size)
    while left > uint64(0):
        left -= one
        symbol = symbols[left]
        entry = packed[symbol]
        share, now = uint32(entry >> uint32(16)), state[left & last]
        full = uint64((now >> uint32(32 - PROBABILITY_BITS)) >= share)
        words[at] = uint16(now)
        at -= full
        now = uint32(now >> uint32(full << uint64(4)))
        quotient = uint32(now * inverse[symbol])
        state[left & last] = uint32(
            (quotient << uint32(PROBABILITY_BITS))
            + (now - quotient * share)
            + (entry & uint32(0xFFFF))
        )
    for coder in range(coders - 1, -1, -1):
        words[at] = uint16(state[coder])
        words[at - one] = uint16(state[coder] >> uint32(16))
        at -= uint64(2)
    return words[at + one :]


@_compile
def decode(words: Any, contexts: Any, packed: Any, slots: Any, coders: Any) -> Any:
    """See :func:`msft_store.codec.rans.decode`."""
    symbols = np.empty(contexts.size, np.uint8)
    state = np.empty(coders, np.uint32)
    at, one = uint64(0), uint64(1)
    for coder in range(coders):
        state[coder] = uint32(words[at]) << uint32(16) | uint32(words[at + one])
        at += uint64(2)
    last = uint64(coders - 1)
    for i in range(contexts.size):
        coder = uint64(i) & last
        now, context = state[coder], uint64(contexts[i])
        slot = now & uint32((1 << PROBABILITY_BITS) - 1)
        symbol = uint64(slots[(context << uint64(PROBABILITY_BITS)) + slot])
        entry = packed[(context << uint64(8)) + symbol]
        now = uint32(
            (entry >> uint32(16)) * (now >> uint32(PROBABILITY_BITS))
            + slot
            - (entry & uint32(0xFFFF))
        )
        low = now < uint32(MIN_STATE)
        refilled = uint32(now << uint32(16) | uint32(words[at]))
        at += uint64(low)
        state[coder] = refilled if low else now
        symbols[i] = symbol
    return symbols, at


@_compile
def compute_exponents(old: Any, positions: Any, shift: Any, mask: Any) -> Any:
    """See :func:`msft_store.codec.exponent_codec.compute_exponents`."""
    exponents = np.empty(positions.size, np.uint8)
    for k in range(positions.size):
        exponents[k] = (uint64(old[positions[k]]) & uint64(mask)) >> uint64(shift)
    return exponents


@_compile
def compute_contexts(old: Any, positions: Any, shift: Any, mask: Any, low: Any, high: Any) -> Any:
    """See :func:`msft_store.codec.exponent_codec.compute_contexts`."""
    contexts = np.empty(positions.size, np.uint8)
    zero = high - low + 1 + FIRST_CLASS
    for k in range(positions.size):
        was = int64(old[positions[k]]) & mask
        context = min(max(was >> shift, low), high) - low + FIRST_CLASS
        contexts[k] = context if was != 0 else zero
    return contexts


@_compile
def read_distances(symbols: Any, words: Any, start: Any, end: Any, bits: Any, least: Any) -> Any:
    """See :func:`msft_store.codec.kernels.read_distances`."""
    distances = np.zeros(symbols.size, np.uint32)
    at, one = uint64(start), uint64(1)
    for k in range(symbols.size):
        token = symbols[k] >> 2
        count = uint64(bits[token])
        word = at >> uint64(5)
        pair = uint64(words[word]) | uint64(words[word + one]) << uint64(32)
        low = (pair >> (at & uint64(31))) & ((one << count) - one)
        distances[k] = uint32(least[token]) + uint32(low)
        at += count
        if at > uint64(end):
            break
    return distances, int64(at)


@_compile
def apply_changes(
    new: Any,
    positions: Any,
    symbols: Any,
    words: Any,
    start: Any,
    end: Any,
    sign: Any,
    bits: Any,
    least: Any,
) -> Any:
    """See :func:`msft_store.codec.kernels.apply_changes`."""
    at, one = uint64(start), uint64(1)
    for k in range(positions.size):
        i = positions[k]
        symbol = uint64(symbols[k])
        token = symbol >> uint64(2)
        count = uint64(bits[token])
        word = at >> uint64(5)
        pair = uint64(words[word]) | uint64(words[word + one]) << uint64(32)
        low = (pair >> (at & uint64(31))) & ((one << count) - one)
        distance = uint64(least[token]) + low
        negative = uint64(0) - ((symbol >> one) & one)
        change = (distance ^ negative) - negative
        new[i] = (uint64(new[i]) ^ ((symbol & one) * uint64(sign))) + change
        at += count
        if at > uint64(end):
            break
    return int64(at)


@_compile
def lists(
    references: Any, positions: Any, blocks: Any, busy: Any, most: Any, mask: Any, gaps: Any
) -> Any:
    """Return True if :func:`locate_listed` would return these positions of these references."""
    quiet, block, skipped, before = 0, 0, 0, -1
    for k in range(positions.size):
        was, position = references[k], int64(positions[k])
        while block < position // BLOCK:
            skipped += not blocks[block]
            block += 1
        if not blocks[block] or (k > 0 and positions[k] <= positions[k - 1]):
            return False
        if not (busy and (was & mask) <= most):
            place = position - BLOCK * skipped
            if quiet >= gaps.size or int64(gaps[quiet]) != place - before - 1:
                return False
            quiet, before = quiet + 1, place
    return quiet == gaps.size


@_compile
def split_rotated_planes(values: Any, width: Any) -> Any:
    """See :func:`msft_store.codec.kernels.split_rotated_planes`."""
    planes = np.empty(width * values.size, np.uint8)
    last = uint64(8 * width - 1)
    for number in range(width):
        plane, shift = planes[number * values.size : (number + 1) * values.size], uint64(8 * number)
        for i in range(values.size):
            value = uint64(values[i])
            plane[i] = ((value << uint64(1)) | (value >> last)) >> shift
    return planes


@_compile
def join_rotated_planes(planes: Any, values: Any, width: Any) -> None:
    """See :func:`msft_store.codec.kernels.join_rotated_planes`."""
    count = values.size
    last = uint64(8 * width - 1)
    if width == 2:
        low, high = planes[:count], planes[count:]
        for i in range(count):
            rotated = uint64(high[i]) << uint64(8) | uint64(low[i])
            values[i] = rotated >> uint64(1) | rotated << last
    else:
        a, b = planes[:count], planes[count : 2 * count]
        c, d = planes[2 * count : 3 * count], planes[3 * count :]
        for i in range(count):
            rotated = uint64(d[i]) << uint64(24) | uint64(c[i]) << uint64(16)
            rotated |= uint64(b[i]) << uint64(8) | uint64(a[i])
            values[i] = rotated >> uint64(1) | rotated << last
