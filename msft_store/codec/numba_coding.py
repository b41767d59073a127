"""The entropy coders of codecs 6, 7 and 9, and the changes of codec 6, compiled by Numba.

Example::

    packed = compute_frequencies(levels)
    words = encode_words(symbols, packed, invert_shares(packed), coders)
    decoded, used = decode(words, contexts, packed, build_slots(packed), coders)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, njit, uint16, uint32, uint64

from msft_store.codec import arithmetic_coder, rans, table_coder
from msft_store.codec.numba_setup import compile_loop, rebind_globals
from msft_store.codec.rans import MIN_STATE, PROBABILITY_BITS

_INVERSE_SLACK = 1 + 2.0**-50
"""Keeps the product with an inverse from falling below the quotient of an exact multiple."""

build_slots = compile_loop(rans.build_slots)
code_decision = njit(inline="always", error_model="numpy")(arithmetic_coder.code_decision)
code_symbols = compile_loop(
    rebind_globals(arithmetic_coder.code_symbols, code_decision=code_decision)
)
code_levels = compile_loop(rebind_globals(table_coder.code_levels, code_decision=code_decision))


@compile_loop
def share_slots(levels: Any, columns: Any, packed: Any) -> None:
    """Fill ``packed`` as :func:`msft_store.codec.rans.compute_frequencies`.

    All symbols that occur are in the first ``columns`` of each context.
    """
    used, shares = np.empty(rans.SYMBOLS, np.int64), np.empty(rans.SYMBOLS, np.int64)
    for first in range(0, levels.size, rans.SYMBOLS):
        count, total = 0, 0
        for i in range(first, first + columns):
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


@compile_loop
def compute_frequencies(levels: Any) -> Any:
    """See :func:`msft_store.codec.rans.compute_frequencies`."""
    packed = np.zeros(levels.size, np.uint32)
    share_slots(levels, rans.SYMBOLS, packed)
    return packed


@compile_loop
def invert_shares(packed: Any) -> Any:
    """Return what a division by each share is replaced by: a multiplication."""
    inverse = np.empty(packed.size, np.float64)
    for i in range(packed.size):
        if packed[i] > 0:
            inverse[i] = _INVERSE_SLACK / (packed[i] >> uint32(16))
    return inverse


@compile_loop
def encode_words(symbols: Any, packed: Any, inverse: Any, coders: Any) -> Any:
    """See :func:`msft_store.codec.rans.encode`; ``inverse`` as of :func:`invert_shares`."""
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


@compile_loop
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


@compile_loop
def compute_exponents(old: Any, positions: Any, shift: Any, mask: Any) -> Any:
    """See :func:`msft_store.codec.exponent_codec.compute_exponents`."""
    exponents = np.empty(positions.size, np.uint8)
    for k in range(positions.size):
        exponents[k] = (uint64(old[positions[k]]) & uint64(mask)) >> uint64(shift)
    return exponents


@compile_loop
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


@compile_loop
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
