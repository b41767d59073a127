"""A reader of codec 6 as anybody would write it from ``docs/FORMAT.md``, section 5, alone.

Slow, in Python's integers, and without a line of the store's own code.

Example::

    assert read_classes(payload, reference, mantissa=7, width=2) == chunk
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import zstandard

Table = list[tuple[int, int, int]]
"""Of one context: (first slot, slots, symbol)."""


class Bits:
    """The stream of low bits."""

    def __init__(self, data: bytes) -> None:
        self._value, self._at = int.from_bytes(data, "little"), 0

    def number(self, token: int) -> int:
        """Return the next number, whose token is known."""
        if token < 4:
            return token
        count = token // 2 - 1
        low = self._value >> self._at & (1 << count) - 1
        self._at += count
        return ((2 + token % 2) << count) + low


def read_classes(payload: bytes, reference: bytes, *, mantissa: int, width: int) -> bytes:
    """Return the chunk of a payload that is sound."""
    listed, gaps, runs, size, words, low, high, busy = struct.unpack_from("<5IBBH", payload)
    sign = 1 << 8 * width - 1
    old = [
        int.from_bytes(reference[at : at + width], "little")
        for at in range(0, len(reference), width)
    ]
    tables = read_tables(payload[24 : 24 + size], high - low + 3)
    middle = 24 + size + 4 * words
    bits = Bits(payload[24 + size : middle])
    coded = iter([word for (word,) in struct.iter_unpack("<H", payload[middle:])])

    symbols = read_symbols([0] * runs + [1] * gaps, tables, coded)
    numbers = [bits.number(symbol // 4) for symbol in symbols]
    everything = busy >= 32768
    lanes = lanes_of_coded_blocks(numbers[:runs], len(old), everything)
    exponents = [(lane & sign - 1) >> mantissa for lane in old]
    chosen = {i for i in lanes if i is not None and exponents[i] < busy % 32768}
    at = -1
    for gap in numbers[runs:]:
        at += gap + 1
        place = lanes[at]
        assert place is not None
        chosen.add(place)

    places = sorted(chosen)
    assert len(places) == listed
    contexts = [2 + min(max(exponents[i], low), high) - low for i in places]
    new = list(old)
    for i, symbol in zip(places, read_symbols(contexts, tables, coded), strict=True):
        distance = bits.number(symbol // 4)
        lane = old[i] ^ (sign if symbol % 2 else 0)
        new[i] = (lane - distance if symbol & 2 else lane + distance) % (2 * sign)
    assert not list(coded)
    return b"".join(lane.to_bytes(width, "little") for lane in new)


def lanes_of_coded_blocks(runs: list[int], count: int, everything: bool) -> list[int | None]:
    """Return the lane that each place in the coded blocks stands for."""
    blocks: list[bool] = []
    for i, length in enumerate(runs):
        blocks += [i % 2 == 1] * length
    total = -(-count // 128)
    blocks += [everything or len(runs) % 2 == 1] * (total - len(blocks))
    return [
        i if i < count else None
        for block, is_coded in enumerate(blocks)
        if is_coded
        for i in range(128 * block, 128 * block + 128)
    ]


def read_tables(frame: bytes, contexts: int) -> list[Table]:
    """Return the slots of each context's symbols."""
    data = zstandard.ZstdDecompressor().decompress(frame)
    columns = len(data) // contexts
    row, tables = [0] * columns, []
    for start in range(0, len(data), columns):
        row = [(a + b) % 256 for a, b in zip(row, data[start : start + columns], strict=True)]
        weights = {
            y: (64, 76, 91, 108)[(v - 1) % 4] << (v - 1) // 4 for y, v in enumerate(row) if v
        }
        total = sum(weights.values())
        share = {y: max(1, 4096 * weight // total) for y, weight in weights.items()}
        rest = 4096 - sum(share.values())
        while rest and share:
            most = max(share, key=lambda y: (share[y], -y))
            step = max(rest, -(share[most] // 2))
            share[most] += step
            rest -= step
        table, begin = [], 0
        for y, slots in share.items():
            table.append((begin, slots, y))
            begin += slots
        tables.append(table)
    return tables


def read_symbols(contexts: list[int], tables: list[Table], words: Iterator[int]) -> list[int]:
    """Return one symbol a context."""
    count = len(contexts)
    coders = 1 << min(max(count // 1024, 1), 1024).bit_length() - 1 if count else 0
    states = [next(words) << 16 | next(words) for _ in range(coders)]
    symbols = []
    for i, context in enumerate(contexts):
        x = states[i % coders]
        slot = x % 4096
        begin, slots, y = next(t for t in tables[context] if t[0] <= slot < t[0] + t[1])
        x = slots * (x // 4096) + slot - begin
        states[i % coders] = x << 16 | next(words) if x < 65536 else x
        symbols.append(y)
    return symbols
