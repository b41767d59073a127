"""Codec 9 in one compiled call for each payload.

The calls return what :mod:`msft_store.codec.compact_codec` defines, byte for byte, and refuse the
same payloads. Between the calls of many small loops, threads would wait for the interpreter.

Example::

    payload = encode_payload(listing, runs, gaps, symbols, distances, layout)
    assert proves(payload, size, positions, references, values, layout)
    decode_payload(payload, lanes, layout, False)     # lanes: unsigned; ValueError on damage
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, uint16, uint32, uint64

from msft_store.codec import rans, table_coder
from msft_store.codec.arithmetic_coder import RATES
from msft_store.codec.changes import (
    DIRECT_TOKENS,
    EXTRA_BITS,
    FIRST_CLASS,
    SMALLEST,
    TOKENS,
    build_tokens,
)
from msft_store.codec.compact_codec import FINE_BITS, MAX_CODERS, SYMBOLS_PER_CODER
from msft_store.codec.exponent_codec import ALL_BLOCKS_CODED
from msft_store.codec.numba_coding import (
    build_slots,
    code_levels,
    encode_words,
    invert_shares,
    share_slots,
)
from msft_store.codec.numba_search import locate_listed
from msft_store.codec.numba_setup import compile_loop
from msft_store.codec.rans import BLOCK, BOUNDS, EXPONENTS, MAX_CLASSES, PROBABILITY_BITS, SYMBOLS

_HEADER_BYTES = 4
_NUMBERS = 6
_NUMBER_BYTES = 5
_WIDEST = 1 << 10
"""No value has more shares."""
_COARSE_BITS, _FINER_BITS = build_tokens(1)[0], build_tokens(2)[0]
_COARSE_LEAST, _FINER_LEAST = build_tokens(1)[1], build_tokens(2)[1]


@compile_loop
def count_coders(count: Any) -> Any:
    """See :func:`msft_store.codec.compact_codec.count_coders`."""
    coders = 1 if count > 0 else 0
    while 0 < coders < MAX_CODERS and 2 * coders <= count // SYMBOLS_PER_CODER:
        coders *= 2
    return coders


@compile_loop
def choose_least(symbols: Any, distances: Any, zero: Any, by: Any) -> Any:
    """Return the least new value that has a token of its own, in shares; 0 without new values."""
    width = uint64(_WIDEST + TOKENS)
    # Four tables avoid that equal neighbours wait for each other's increment.
    parts = np.zeros(4 * width, np.uint32)
    first = uint16(zero << 8)
    for k in range(uint64(symbols.size)):
        # Values of zero have their own token, so they are counted where no window begins.
        share = uint64(distances[k]) >> by if distances[k] > 0 else width - uint64(1)
        if symbols[k] >= first:
            parts[(k & uint64(3)) * width + share] += uint32(1)
    counts = np.zeros(width, np.int64)
    for i in range(width):
        for table in range(uint64(4)):
            counts[i] += parts[table * width + i]
    within = 0
    for share in range(TOKENS - 2):
        within += counts[share]
    most, least = within, 0
    for share in range(1, _WIDEST):
        within += counts[share + TOKENS - 3] - counts[share - 1]
        if within > most:
            most, least = within, share
    return least


@compile_loop
def list_tokens(least: Any, layout: Any) -> Any:
    """Return the low bits and the smallest value of each token of a change, then of a new value.

    Tables replace branches that the processor could not predict.
    """
    shift, magnitude, fine = layout
    bits, smallest = np.empty(2 * TOKENS, np.uint8), np.zeros(2 * TOKENS, np.uint64)
    bits[:TOKENS] = _FINER_BITS if fine == 2 else _COARSE_BITS
    smallest[:TOKENS] = _FINER_LEAST if fine == 2 else _COARSE_LEAST
    bits[TOKENS], bits[TOKENS + 1] = 0, magnitude
    for token in range(2, TOKENS):
        bits[TOKENS + token] = shift - FINE_BITS
        smallest[TOKENS + token] = (least + token - 2) << (shift - FINE_BITS)
    return bits, smallest


@compile_loop
def replace_token(symbol: Any, value: Any, least: Any, by: Any) -> Any:
    """Return the symbol of a change, with the token of a new value instead of its own."""
    token = int64(value >> by) - least + 2
    token = 1 if token < 2 or token >= TOKENS else token
    token = 0 if value == uint64(0) else token
    return (symbol & uint64(0xFF01)) | uint64(token) << uint64(2)


@compile_loop
def replace_levels(histogram: Any) -> Any:
    """Replace counts by levels plus 1, as :func:`msft_store.codec.rans.compute_levels` has them.

    Returns the number of columns up to the last symbol that occurs, at least 1.
    """
    columns = 1
    for first in range(0, histogram.size, SYMBOLS):
        total = 0
        for i in range(first, first + SYMBOLS):
            total += histogram[i]
        if total == 0:
            continue
        for i in range(first, first + SYMBOLS):
            if histogram[i] > 0:
                share = (histogram[i] << 19) // total
                low, high = 0, BOUNDS.size
                while low < high:
                    middle = (low + high) >> 1
                    if share < BOUNDS[middle]:
                        high = middle
                    else:
                        low = middle + 1
                histogram[i] = low + 1
                columns = max(columns, i - first + 1)
    return columns


@compile_loop
def write_tables(levels: Any, columns: Any) -> Any:
    """Return the tables as :func:`msft_store.codec.table_coder.encode_tables` does."""
    used, contexts = 0, levels.size // SYMBOLS
    for i in range(levels.size):
        used += levels[i] > 0
    # A decision takes at most eleven bits, and an empty row or cell takes one decision.
    longest = table_coder.MAX_LEVEL_BYTES * used + 2 * contexts * (columns + 1)
    data = np.empty(longest + 8, np.uint8)
    data[0] = columns - 1
    one, other = np.zeros(table_coder.COUNTERS, np.int32), np.zeros(table_coder.COUNTERS, np.int32)
    size = 1 + code_levels(True, data[1:], levels, contexts, columns, one, other, RATES)
    while size > 1 and data[size - 1] == 0:
        size -= 1
    return data[:size]


@compile_loop
def write_number(payload: Any, at: Any, number: Any) -> Any:
    """Write a number as :func:`msft_store.codec.compact_codec.encode_number`; return its end."""
    while number > 127:
        payload[at] = number & 127 | 128
        number >>= 7
        at += 1
    payload[at] = number
    return at + 1


@compile_loop
def write_plain(runs: Any, gaps: Any, counts: Any, words: Any) -> Any:
    """Return the symbols of runs and gaps and where their low bits end in ``words``; count them.

    The end is the number of full words, the bits of the next one, and how many these are.
    """
    plain = np.empty(runs.size + gaps.size, np.uint16)
    used, buffer, filled, one = uint64(0), uint64(0), uint64(0), uint64(1)
    for k in range(plain.size):
        value = uint32(runs[k]) if k < runs.size else uint32(gaps[k - runs.size])
        half = (np.float64(value).view(np.int64) >> 51) - 2046
        token = int64(value) if value < DIRECT_TOKENS else half
        plain[k] = (0 if k < runs.size else 1 << 8) | token << 2
        counts[plain[k]] += 1
        count = uint64(EXTRA_BITS[token])
        buffer |= (uint64(value) & ((one << count) - one)) << filled
        filled += count
        if filled >= uint64(32):
            words[used] = uint32(buffer)
            used += one
            buffer >>= uint64(32)
            filled -= uint64(32)
    return plain, (used, buffer, filled)


@compile_loop
def write_changes(found: Any, zero: Any, layout: Any, counts: Any, words: Any, end: Any) -> Any:
    """Return the symbols of changes, the end of their low bits, and the least new value."""
    symbols, distances = found
    used, buffer, filled = end
    by, one = uint64(layout[0] - FINE_BITS), uint64(1)
    least = choose_least(symbols, distances, zero, by)
    bits, first_new = list_tokens(least, layout)[0], uint64(zero << 8)
    coded, other = np.empty(symbols.size, np.uint16), np.zeros(counts.size, np.int64)
    for k in range(uint64(symbols.size)):
        symbol, value = uint64(symbols[k]), uint64(distances[k])
        is_new = symbol >= first_new
        symbol = replace_token(symbol, value, least, by) if is_new else symbol
        token = (symbol >> uint64(2)) & uint64(TOKENS - 1)
        count = uint64(bits[uint64(TOKENS) * uint64(is_new) + token])
        coded[k] = symbol
        # Two histograms avoid that equal neighbours wait for each other's increment.
        if k & one:
            counts[symbol] += 1
        else:
            other[symbol] += 1
        buffer |= (value & ((one << count) - one)) << filled
        filled += count
        if filled >= uint64(32):
            words[used] = uint32(buffer)
            used += one
            buffer >>= uint64(32)
            filled -= uint64(32)
    for i in range(counts.size):
        counts[i] += other[i]
    return coded, (used, buffer, filled), least


@compile_loop
def encode_payload(listing: Any, plain_values: Any, found: Any, layout: Any) -> Any:
    """Return the payload (uint8) of changes.

    ``listing`` is ``low``, ``high`` and ``busy``; ``plain_values`` the runs and gaps; ``found`` the
    symbols and distances; ``layout`` the bits of the mantissa, those of all but the sign, and the
    fineness of tokens.
    """
    low, high, busy = listing
    runs, gaps = plain_values
    zero = FIRST_CLASS + high - low + 1
    counts = np.zeros((zero + 1) * SYMBOLS, np.int64)
    words = np.empty(runs.size + gaps.size + found[0].size + 1, np.uint32)
    plain, end = write_plain(runs, gaps, counts, words)
    coded, end, least = write_changes(found, zero, layout, counts, words, end)
    used, buffer, filled = end
    words[used] = uint32(buffer)
    columns = replace_levels(counts)
    tables = write_tables(counts, columns)
    packed = np.zeros(counts.size, np.uint32)
    share_slots(counts, columns, packed)
    inverse = invert_shares(packed)
    first = encode_words(plain, packed, inverse, count_coders(plain.size))
    rest = encode_words(coded, packed, inverse, count_coders(coded.size))
    low_bytes = int64(4 * used) + (int64(filled) + 7) // 8
    size = _HEADER_BYTES + _NUMBERS * _NUMBER_BYTES + tables.size + low_bytes
    payload = np.empty(size + 2 * (first.size + rest.size), np.uint8)
    payload[0], payload[1], payload[2], payload[3] = low, high, busy & 255, busy >> 8
    at = _HEADER_BYTES
    for number in (coded.size, gaps.size, runs.size, tables.size, low_bytes, least):
        at = write_number(payload, at, number)
    for part in (
        tables,
        words.view(np.uint8)[:low_bytes],
        first.view(np.uint8),
        rest.view(np.uint8),
    ):
        payload[at : at + part.size] = part
        at += part.size
    return payload[:at]


@compile_loop
def read_number(payload: Any, at: Any) -> Any:
    """Return a number and its end; :class:`ValueError` if it has none."""
    number = 0
    for place in range(_NUMBER_BYTES):
        if at >= payload.size:
            raise ValueError("a compact chunk ends in its header")
        number |= int64(payload[at] & 127) << (7 * place)
        at += 1
        if payload[at - 1] < 128:
            return number, at
    raise ValueError("a compact chunk has a number of too many bytes")


@compile_loop
def read_tables(data: Any, contexts: Any) -> Any:
    """Return frequencies as :func:`msft_store.codec.rans.compute_frequencies` has them."""
    if data.size == 0:
        raise ValueError("a compact chunk has no tables")
    levels = np.zeros(contexts * SYMBOLS, np.int64)
    one, other = np.zeros(table_coder.COUNTERS, np.int32), np.zeros(table_coder.COUNTERS, np.int32)
    columns = int64(data[0]) + 1
    read = code_levels(False, data[1:].copy(), levels, contexts, columns, one, other, RATES)
    if read < data.size - 1:
        raise ValueError("a compact chunk has impossible tables")
    packed = np.zeros(levels.size, np.uint32)
    share_slots(levels, columns, packed)
    return packed


@compile_loop
def read_plain(numbers: Any, words: Any, packed: Any, slots: Any, low_bits: Any) -> Any:
    """Return the values of runs and gaps, the words that they took, and the end of low bits."""
    runs, count, end = numbers
    coders, one = count_coders(count), uint64(1)
    values = np.empty(count, np.uint32)
    state = np.empty(coders, np.uint32)
    used, at = start_coders(words, uint64(0), state), uint64(0)
    for k in range(count):
        context = uint64(k >= runs)
        coder = uint64(k) & uint64(coders - 1)
        now, symbol, used = decode_symbol(state[coder], context, words, used, packed, slots)
        state[coder] = now
        token = symbol >> uint64(2)
        wide, word = uint64(EXTRA_BITS[token]), at >> uint64(5)
        pair = uint64(low_bits[word]) | uint64(low_bits[word + one]) << uint64(32)
        low = (pair >> (at & uint64(31))) & ((one << wide) - one)
        values[k] = uint32(uint64(SMALLEST[token]) + low)
        at += wide
        if at > uint64(end):
            raise ValueError("a compact chunk ends too early")
    return values, used, at


@compile_loop
def start_coders(words: Any, at: Any, state: Any) -> Any:
    """Read the states of coders; return the end of these."""
    for coder in range(state.size):
        state[coder] = uint32(words[at]) << uint32(16) | uint32(words[at + uint64(1)])
        at += uint64(2)
    return at


@compile_loop
def decode_symbol(now: Any, context: Any, words: Any, at: Any, packed: Any, slots: Any) -> Any:
    """Return a coder's next state, its symbol and the next word."""
    slot = now & uint32((1 << PROBABILITY_BITS) - 1)
    symbol = uint64(slots[(context << uint64(PROBABILITY_BITS)) + slot])
    entry = packed[(context << uint64(8)) + symbol]
    now = uint32(
        (entry >> uint32(16)) * (now >> uint32(PROBABILITY_BITS)) + slot - (entry & uint32(0xFFFF))
    )
    low = now < uint32(rans.MIN_STATE)
    refilled = uint32(now << uint32(16) | uint32(words[at]))
    return (refilled if low else now), symbol, at + uint64(low)


@compile_loop
def mark_coded(runs: Any, blocks: Any) -> Any:
    """Return a mask of the coded blocks, see :func:`msft_store.codec.changes.decode_runs`."""
    coded = np.zeros(blocks, np.bool_)
    begin, inside = uint64(0), False
    for length in runs:
        if begin + uint64(length) >= uint64(blocks):
            raise ValueError("a chunk has runs beyond its end")
        coded[begin : begin + uint64(length)] = inside
        begin, inside = begin + uint64(length), not inside
    coded[begin:] = inside
    return coded


@compile_loop
def open_payload(payload: Any, size: Any, magnitude: Any) -> Any:
    """Read a payload for ``size`` lanes up to the symbols of changes; :class:`ValueError`."""
    if payload.size < _HEADER_BYTES:
        raise ValueError("a compact chunk has no header")
    low, high = int64(payload[0]), int64(payload[1])
    busy = int64(payload[2]) | int64(payload[3]) << 8
    all_coded, busy = busy & ALL_BLOCKS_CODED != 0, busy & (ALL_BLOCKS_CODED - 1)
    count, at = read_number(payload, _HEADER_BYTES)
    gaps, at = read_number(payload, at)
    runs, at = read_number(payload, at)
    table_bytes, at = read_number(payload, at)
    low_bytes, at = read_number(payload, at)
    least, at = read_number(payload, at)
    blocks = -(-size // BLOCK)
    if max(count, gaps) > size or at + table_bytes + low_bytes > payload.size:
        raise ValueError("a compact chunk has the wrong length")
    if runs > (0 if all_coded else blocks):
        raise ValueError("a compact chunk has the wrong length")
    if low > high or high - low >= MAX_CLASSES or busy > EXPONENTS or least >> magnitude > 0:
        raise ValueError("a compact chunk has impossible exponents")
    packed = read_tables(payload[at : at + table_bytes], FIRST_CLASS + high - low + 2)
    at += table_bytes
    # The loops read two words beyond the last one.
    low_bits = np.empty((low_bytes + 3) // 4 + 2, np.uint32)
    data = low_bits.view(np.uint8)
    data[:low_bytes] = payload[at : at + low_bytes]
    data[low_bytes:] = 0
    at += low_bytes
    given = (payload.size - at) // 2
    if payload.size - at != 2 * given:
        raise ValueError("a chunk ends within a word")
    # Decoding takes at most this many words, even from a damaged payload.
    most = 2 * (count_coders(runs + gaps) + count_coders(count)) + runs + gaps + count + 1
    words = np.empty(max(given, most), np.uint16)
    words.view(np.uint8)[: 2 * given] = payload[at:]
    words[given:] = 0
    slots = build_slots(packed)
    values, used, bit = read_plain(
        (runs, runs + gaps, 8 * low_bytes), words, packed, slots, low_bits
    )
    if used > uint64(given):
        raise ValueError("a chunk ends too early")
    coded = np.ones(blocks, np.bool_) if all_coded else mark_coded(values[:runs], blocks)
    listing = low, high, busy, least
    tables = packed, slots
    streams = words, used, uint64(given), low_bits, bit, uint64(8 * low_bytes)
    return count, listing, coded, values[runs:], tables, streams


@compile_loop
def apply_symbols(
    lanes: Any, positions: Any, listing: Any, tables: Any, streams: Any, layout: Any
) -> Any:
    """Change the lanes at the positions; :class:`ValueError` if the streams do not fit."""
    low, high, _, least = listing
    packed, slots = tables
    words, used, given, low_bits, at, end = streams
    shift, magnitude, _ = layout
    bits, smallest = list_tokens(least, layout)
    mask, one = (1 << magnitude) - 1, uint64(1)
    zero = uint64(FIRST_CLASS + high - low + 1)
    coders = count_coders(positions.size)
    state = np.empty(coders, np.uint32)
    used = start_coders(words, used, state)
    for k in range(positions.size):
        place = positions[k]
        before = int64(lanes[place])
        was = before & mask
        context = uint64(min(max(was >> shift, low), high) - low + FIRST_CLASS)
        context = context if was != 0 else zero
        coder = uint64(k) & uint64(coders - 1)
        now, symbol, used = decode_symbol(state[coder], context, words, used, packed, slots)
        state[coder] = now
        token = uint64(TOKENS) * uint64(was == 0) + (symbol >> uint64(2))
        wide, start = uint64(bits[token]), smallest[token]
        word = at >> uint64(5)
        pair = uint64(low_bits[word]) | uint64(low_bits[word + one]) << uint64(32)
        distance = start + ((pair >> (at & uint64(31))) & ((one << wide) - one))
        negative = uint64(0) - ((symbol >> one) & one)
        change = (distance ^ negative) - negative
        lanes[place] = (uint64(before) ^ ((symbol & one) << uint64(magnitude))) + change
        at += wide
        if at > end:
            break
    if used != given:
        raise ValueError("a chunk has bytes after its end, or too few")
    if at > end or end - at >= uint64(8):
        raise ValueError("a compact chunk has the wrong number of low bits")


@compile_loop
def decode_payload(payload: Any, lanes: Any, layout: Any, keep: Any) -> Any:
    """Replace the reference in ``lanes`` (unsigned) by the decoded lanes; :class:`ValueError`.

    Returns the positions of the listed lanes and, with ``keep``, what these lanes were.
    """
    shift, magnitude, _ = layout
    count, listing, coded, gaps, tables, streams = open_payload(payload, lanes.size, magnitude)
    limit, mask = listing[2] << shift, (1 << magnitude) - 1
    bounds = np.empty(2, lanes.dtype)
    bounds[0], bounds[1] = max(min(limit - 1, mask), 0), mask
    positions = locate_listed(lanes, coded, limit > 0, bounds[0], bounds[1], gaps, count)
    if positions.size != count:
        raise ValueError("a chunk lists another number of elements than it has")
    before = np.empty(count if keep else 0, lanes.dtype)
    for k in range(before.size):
        before[k] = lanes[positions[k]]
    apply_symbols(lanes, positions, listing, tables, streams, layout)
    return positions, before


@compile_loop
def lists(listed: Any, coded: Any, limit: Any, mask: Any, gaps: Any) -> Any:
    """Return True if a decoder would locate these positions, given their references."""
    positions, references = listed
    wrong, quiet, one = False, uint64(0), uint64(1)
    for k in range(one, uint64(positions.size)):
        wrong |= positions[k] <= positions[k - one]
    if wrong:
        return False
    block, skipped, next_place = uint64(0), uint64(0), uint64(0)
    width, all_coded, count = uint64(BLOCK), coded.all(), uint64(gaps.size)
    for k in range(uint64(positions.size)):
        is_quiet = (references[k] & mask) >= limit
        if all_coded and not is_quiet:
            continue
        position = uint64(positions[k])
        while block < position // width:
            skipped += uint64(not coded[block])
            block += one
        if not coded[block]:
            return False
        if is_quiet:
            place = position - width * skipped
            if quiet >= count or uint64(gaps[quiet]) + next_place != place:
                return False
            quiet, next_place = quiet + one, place + one
    return quiet == count


@compile_loop
def explains(listed: Any, coded: Any, distances: Any, listing: Any, layout: Any) -> Any:
    """Return True if symbols have the contexts of references, and change these to the values.

    The loop has neither branches nor tables, so that the compiler vectorises it.
    """
    references, values = listed
    low, high, _, _ = listing
    shift, magnitude, _ = layout
    mask, sign = (1 << magnitude) - 1, uint64(1) << uint64(magnitude)
    zero, wrong = FIRST_CLASS + high - low + 1, uint64(0)
    for k in range(references.size):
        before, symbol = int64(references[k]), int64(coded[k])
        was = before & mask
        context = min(max(was >> shift, low), high) - low + FIRST_CLASS
        context = context if was != 0 else zero
        negative = uint64(0) - uint64((symbol >> 1) & 1)
        change = (uint64(distances[k]) ^ negative) - negative
        after = (uint64(before) ^ (uint64(symbol & 1) * sign)) + change
        wrong |= uint64(symbol >> 8) ^ uint64(context)
        wrong |= (after ^ uint64(values[k])) & (sign | uint64(mask))
    return wrong == uint64(0)


@compile_loop
def holds_symbols(coded: Any, packed: Any, streams: Any) -> Any:
    """Return True if words decode to these symbols and end with the last.

    A decoder finds a symbol by its share of the coder's range. To know the symbol, and to see that
    the share is its own, needs fewer steps.
    """
    words, used, given = streams[:3]
    coders, one = uint64(count_coders(coded.size)), uint64(1)
    state = np.empty(coders, np.uint32)
    at, wrong = uint64(start_coders(words, used, state)), False
    for k in range(uint64(coded.size)):
        entry, now = packed[coded[k]], state[k & (coders - one)]
        share = entry >> uint32(16)
        within = uint32((now & uint32((1 << PROBABILITY_BITS) - 1)) - (entry & uint32(0xFFFF)))
        wrong |= within >= share
        now = uint32(share * (now >> uint32(PROBABILITY_BITS)) + within)
        refilled = uint32(now << uint32(16) | uint32(words[at]))
        low = now < uint32(rans.MIN_STATE)
        at += uint64(low)
        state[k & (coders - one)] = refilled if low else now
    return not wrong and at == given


@compile_loop
def holds_distances(coded: Any, distances: Any, zero: Any, tokens: Any, streams: Any) -> Any:
    """Return True if symbols and low bits stand for these distances, and no bits are left."""
    bits, smallest = tokens
    low_bits, start, end = streams[3:]
    at, wrong, one, five = uint64(start), uint64(0), uint64(1), uint64(5)
    first_new = uint64(zero << 8)
    for k in range(uint64(coded.size)):
        symbol = uint64(coded[k])
        token = (symbol >> uint64(2)) & uint64(TOKENS - 1)
        token += uint64(TOKENS) * uint64(symbol >= first_new)
        wide, word = uint64(bits[token]), at >> five
        pair = uint64(low_bits[word]) | uint64(low_bits[word + one]) << uint64(32)
        low = (pair >> (at & uint64(31))) & ((one << wide) - one)
        wrong |= (smallest[token] + low) ^ uint64(distances[k])
        at += wide
        if at > end:
            return False
    return wrong == uint64(0) and end - at < uint64(8)


@compile_loop
def gives(listed: Any, changes: Any, listing: Any, tables: Any, streams: Any, layout: Any) -> Any:
    """Return True if :func:`apply_symbols` would change the references to the values."""
    symbols, distances = changes
    low, high, _, least = listing
    zero, by = FIRST_CLASS + high - low + 1, uint64(layout[0] - FINE_BITS)
    first_new, coded = uint64(zero << 8), symbols
    if least > 0 or (symbols >= uint16(zero << 8)).any():
        coded = np.empty(symbols.size, np.uint16)
        for k in range(uint64(symbols.size)):
            symbol = uint64(symbols[k])
            new = replace_token(symbol, uint64(distances[k]), least, by)
            coded[k] = new if symbol >= first_new else symbol
    if symbols.size > 0 and int64(coded.max()) >= tables[0].size:
        return False
    return (
        explains(listed, coded, distances, listing, layout)
        and holds_symbols(coded, tables[0], streams)
        and holds_distances(coded, distances, zero, list_tokens(least, layout), streams)
    )


@compile_loop
def proves(payload: Any, size: Any, listed: Any, changes: Any, layout: Any) -> Any:
    """Return True if a payload gives the listed lanes, which are all that differ, their values.

    ``listed`` is positions, references and values; ``changes`` is their symbols and distances.
    """
    positions, references, values = listed
    shift, magnitude, _ = layout
    count, listing, coded, gaps, tables, streams = open_payload(payload, size, magnitude)
    limit, mask = listing[2] << shift, (1 << magnitude) - 1
    if count != positions.size or not lists((positions, references), coded, limit, mask, gaps):
        return False
    return gives((references, values), changes, listing, tables, streams, layout)
