"""A reader of all codecs, written from ``docs/FORMAT.md``, section 5, alone.

Slow, codecs 6 to 9 in Python's integers, and without a line of the store's own code.

Example::

    assert decode(6, payload, len(chunk), reference, "bfloat16") == chunk
"""

from __future__ import annotations

import itertools
import struct
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import zstandard

Table = list[tuple[int, int, int]]
"""The symbols of one context: (first slot, slots, symbol)."""


DTYPES = [
    (1, "bool", 1),
    (2, "uint8", 1),
    (3, "int8", 1),
    (4, "uint16", 2),
    (5, "int16", 2),
    (6, "uint32", 4),
    (7, "int32", 4),
    (8, "uint64", 8),
    (9, "int64", 8),
    (16, "float16", 2),
    (17, "bfloat16", 2),
    (18, "float32", 4),
    (19, "float64", 8),
    (24, "float8_e4m3fn", 1),
    (25, "float8_e5m2", 1),
    (26, "float8_e4m3fnuz", 1),
    (27, "float8_e5m2fnuz", 1),
    (28, "float8_e8m0fnu", 1),
    (32, "complex32", 4),
    (33, "complex64", 8),
    (34, "complex128", 16),
]
CODES = {code: name for code, name, _ in DTYPES}
SIZES = {name: size for _, name, size in DTYPES}
"""Bytes of an element."""
MANTISSAS = {"float16": 10, "complex32": 10, "bfloat16": 7, "float32": 23, "complex64": 23}


def decode(code: int, payload: bytes, size: int, reference: bytes | None, dtype: str) -> bytes:
    """Return the ``size`` bytes of a chunk; ``reference`` has the same size, or is ``None``."""
    width = SIZES[dtype] // 2 if dtype.startswith("complex") else SIZES[dtype]
    if code == 0:
        return payload
    if code == 1:
        return inflate(payload, size)
    if code == 2:
        return lanes_of_planes(inflate(payload, size), width).tobytes()
    if code == 8:
        return read_turned(payload, width=width)
    assert reference is not None
    assert len(reference) == size
    if code == 3:
        return reference
    if code in (6, 7, 9):
        read = {6: read_classes, 7: read_adaptive, 9: read_compact}[code]
        return read(payload, reference, mantissa=MANTISSAS[dtype], width=width)
    old = np.frombuffer(reference, f"<i{width}").copy()
    places: slice | np.ndarray = slice(None)
    planes = b""
    if code == 4:
        planes = inflate(payload, size)
    elif code == 5:
        (count,) = struct.unpack_from("<I", payload)
        both = inflate(payload[4:], count * (4 + width))
        places = np.cumsum(lanes_of_planes(both[: 4 * count], 4).astype(np.int64) + 1) - 1
        planes = both[4 * count :]
    else:
        raise ValueError(f"no codec has the code {code}")
    floating = ("float" in dtype and dtype != "float8_e8m0fnu") or "complex" in dtype
    old[places] = changed(old[places], lanes_of_planes(planes, width), floating=floating)
    return old.tobytes()


def inflate(frame: bytes, size: int, dictionary: bytes = b"") -> bytes:
    """Return the ``size`` bytes of a zstd frame."""
    known = zstandard.ZstdCompressionDict(dictionary, dict_type=1) if dictionary else None
    limited = zstandard.ZstdDecompressor(dict_data=known, max_window_size=1 << 27).decompressobj()
    data = limited.decompress(frame)
    assert len(data) == size
    return data


def lanes_of_planes(planes: bytes, width: int) -> np.ndarray:
    """Return unsigned lanes, whose lowest bytes come first, then the second ones, and so on."""
    rows = np.frombuffer(planes, np.uint8).reshape(width, -1)
    return np.ascontiguousarray(rows.T).view(f"<u{width}").reshape(-1)


def changed(old: np.ndarray, codes: np.ndarray, *, floating: bool) -> np.ndarray:
    """Return signed lanes after zigzag-coded changes of their ordered form."""
    most = np.iinfo(old.dtype).max
    steps = (codes >> 1).astype(old.dtype)
    steps = np.where(codes & 1, -1 - steps, steps)
    if not floating:
        return old + steps
    ordered = np.where(old >= 0, old, old ^ most) + steps
    return np.where(ordered >= 0, ordered, ordered ^ most)


class Bits:
    """The stream of low bits."""

    def __init__(self, data: bytes) -> None:
        self._value, self._at = int.from_bytes(data, "little"), 0

    def number(self, token: int, half: int | None = None) -> int:
        """Return the next number, given its token and perhaps its half."""
        if token < 4:
            return token
        count = token // 2 - 1
        rest = count if half is None else count - 1
        return ((2 + token % 2) << count) + ((half or 0) << rest) + self.take(rest)

    def take(self, count: int) -> int:
        """Return the next bits."""
        low = self._value >> self._at & (1 << count) - 1
        self._at += count
        return low


def read_classes(payload: bytes, reference: bytes, *, mantissa: int, width: int) -> bytes:
    """Return the chunk of a valid payload of codec 6."""
    listed, gaps, runs, size, words, low, high, busy = struct.unpack_from("<5IBBH", payload)
    tables = read_tables(payload[24 : 24 + size], high - low + 3)
    middle = 24 + size + 4 * words
    bits = Bits(payload[24 + size : middle])
    coded = iter([word for (word,) in struct.iter_unpack("<H", payload[middle:])])

    old, exponents = lanes_of(reference, mantissa, width)
    symbols = read_symbols([0] * runs + [1] * gaps, tables, coded)
    numbers = [bits.number(symbol // 4) for symbol in symbols]
    places = listed_lanes(exponents, numbers[:runs], numbers[runs:], busy)
    assert len(places) == listed
    contexts = [2 + min(max(exponents[i], low), high) - low for i in places]
    for i, symbol in zip(places, read_symbols(contexts, tables, coded), strict=True):
        distance = bits.number(symbol // 4)
        old[i] = moved(old[i], distance, symbol & 2, symbol & 1, width)
    assert not list(coded)
    return b"".join(lane.to_bytes(width, "little") for lane in old)


def read_adaptive(payload: bytes, reference: bytes, *, mantissa: int, width: int) -> bytes:
    """Return the chunk of a valid payload of codec 7."""
    listed, gaps, runs, size, words, low, high, busy = struct.unpack_from("<5IBBH", payload)
    middle = 24 + size + 4 * words
    bits = Bits(payload[24 + size : middle])

    old, exponents = lanes_of(reference, mantissa, width)
    head = Decisions(payload[24 : 24 + size], 0, 1).symbols([0] * runs + [1] * gaps)
    numbers = [bits.number(token, half) for token, _, _, half in head]
    places = listed_lanes(exponents, numbers[:runs], numbers[runs:], busy)
    assert len(places) == listed
    body = Decisions(payload[middle:], low, high).symbols([exponents[i] for i in places])
    for i, (token, flipped, smaller, half) in zip(places, body, strict=True):
        old[i] = moved(old[i], bits.number(token, half), smaller, flipped, width)
    return b"".join(lane.to_bytes(width, "little") for lane in old)


def read_compact(payload: bytes, reference: bytes, *, mantissa: int, width: int) -> bytes:
    """Return the chunk of a valid payload of codec 9."""
    low, high, busy = struct.unpack_from("<BBH", payload)
    numbers, at = [], 4
    for _ in range(6):
        number = place = 0
        while True:
            number |= payload[at] % 128 << place
            at, place = at + 1, place + 7
            if payload[at - 1] < 128:
                break
        numbers.append(number)
    listed, gaps, runs, size, low_bytes, least = numbers
    tables = [shares(row) for row in CompactTables(payload[at : at + size]).rows(high - low + 4)]
    middle = at + size + low_bytes
    bits = Bits(payload[at + size : middle])
    coded = iter([word for (word,) in struct.iter_unpack("<H", payload[middle:])])

    old, exponents = lanes_of(reference, mantissa, width)
    limits = 2048, 64
    symbols = read_symbols([0] * runs + [1] * gaps, tables, coded, *limits)
    distances = [bits.number(symbol // 4) for symbol in symbols]
    places = listed_lanes(exponents, distances[:runs], distances[runs:], busy)
    assert len(places) == listed
    is_zero = {i for i in places if old[i] % (1 << 8 * width - 1) == 0}
    contexts = [
        high - low + 3 if i in is_zero else 2 + min(max(exponents[i], low), high) - low
        for i in places
    ]
    for i, symbol in zip(places, read_symbols(contexts, tables, coded, *limits), strict=True):
        token = symbol // 4
        if i in is_zero:
            distance = 0
            if token == 1:
                distance = bits.take(8 * width - 1)
            elif token > 1:
                distance = (least + token - 2 << mantissa - 2) + bits.take(mantissa - 2)
        else:
            distance = quarter(bits, token) if width == 2 else bits.number(token)
        old[i] = moved(old[i], distance, symbol & 2, symbol & 1, width)
    assert not list(coded)
    return b"".join(lane.to_bytes(width, "little") for lane in old)


def quarter(bits: Bits, token: int) -> int:
    """Return the next number of quarter octaves."""
    if token < 4:
        return token
    count = token // 4 - 1
    return (4 + token % 4 << count) + bits.take(count)


def read_turned(payload: bytes, *, width: int) -> bytes:
    """Return the chunk of a valid payload of codec 8."""
    planes = zstandard.ZstdDecompressor().decompress(payload)
    count = len(planes) // width
    turned = (int.from_bytes(planes[i::count], "little") for i in range(count))
    lanes = (lane >> 1 | (lane & 1) << 8 * width - 1 for lane in turned)
    return b"".join(lane.to_bytes(width, "little") for lane in lanes)


def lanes_of(reference: bytes, mantissa: int, width: int) -> tuple[list[int], list[int]]:
    """Return lanes and their exponents."""
    starts = range(0, len(reference), width)
    lanes = [int.from_bytes(reference[at : at + width], "little") for at in starts]
    return lanes, [(lane & (1 << 8 * width - 1) - 1) >> mantissa for lane in lanes]


def moved(lane: int, distance: int, smaller: int, flipped: int, width: int) -> int:
    """Return a changed lane."""
    lane ^= (1 << 8 * width - 1) if flipped else 0
    return (lane - distance if smaller else lane + distance) % (1 << 8 * width)


def listed_lanes(exponents: list[int], runs: list[int], gaps: list[int], busy: int) -> list[int]:
    """Return the listed lanes."""
    lanes = lanes_of_coded_blocks(runs, len(exponents), busy >= 32768)
    chosen = {i for i in lanes if i is not None and exponents[i] < busy % 32768}
    at = -1
    for gap in gaps:
        at += gap + 1
        place = lanes[at]
        assert place is not None
        chosen.add(place)
    return sorted(chosen)


def lanes_of_coded_blocks(runs: list[int], count: int, everything: bool) -> list[int | None]:
    """Return the lane at each place in the coded blocks."""
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
        tables.append(shares(row))
    return tables


def shares(levels: list[int]) -> Table:
    """Return the slots of one context's symbols."""
    weights = {y: (64, 76, 91, 108)[(v - 1) % 4] << (v - 1) // 4 for y, v in enumerate(levels) if v}
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
    return table


def read_symbols(
    contexts: list[int],
    tables: list[Table],
    words: Iterator[int],
    each: int = 1024,
    most: int = 1024,
) -> list[int]:
    """Return one symbol for each context."""
    count = len(contexts)
    coders = 1 << min(max(count // each, 1), most).bit_length() - 1 if count else 0
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


class Decisions:
    """A sequence of codec 7."""

    def __init__(self, data: bytes, low: int, high: int) -> None:
        self._data: Iterator[int] = iter(data)
        self._low, self._high = low, high
        self._bottom, self._top, self._value = 0, 2**32 - 1, 0
        self._counters: dict[tuple[int, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))

    def symbols(self, exponents: list[int]) -> list[tuple[int, int, int, int]]:
        """Return token, flipped, smaller and half of each symbol; all bytes must be used."""
        if exponents:
            self._value = int.from_bytes([next(self._data) for _ in range(4)], "big")
        quick = slow = 512 * exponents[0] if exponents else 0
        found = []
        for e in exponents:
            place = min(max(e, self._low), self._high) - self._low
            near, far = (min(max(x // 256 - 2 * e + 8, 0), 63) for x in (quick, slow))
            token, flipped, smaller, half = self._symbol((place,), (near // 4, far))
            found.append((token, flipped, smaller, half))
            change = token if token >= 2 else 0 if token or flipped else -2
            quick += (256 * (2 * e + change) - quick) // 8
            slow += (256 * (2 * e + change) - slow) // 64
        assert not list(self._data)
        return found

    def _symbol(self, *contexts: tuple[int, ...]) -> tuple[int, int, int, int]:
        def yes(place: int) -> int:
            return self._decide([(*context, place) for context in contexts])

        if not yes(0):
            return 0, 0, 0, 0
        token, flipped = next((d for d in (1, 2, 3) if yes(d)), 0), 0
        direct = token
        if not direct:
            path = 1
            for _ in range(7):
                path = 2 * path + yes(128 + path)
            token, flipped = path % 64, path // 64 % 2
        smaller = yes(3 + token if direct else 256 + 2 * token + flipped) if token else 0
        half = yes(384 + 2 * token + flipped) if token >= 4 else 0
        return token, flipped, smaller, half

    def _decide(self, keys: list[tuple[int, ...]]) -> int:
        both = sum(256 * a + n for a, n in (self._counters[key] for key in keys))
        chance = min(max(both // 8192 + 32768, 32), 65504)
        middle = self._bottom + (self._top - self._bottom) * chance // 65536
        bit = int(self._value <= middle)
        if bit:
            self._top = middle
        else:
            self._bottom = middle + 1
        while self._bottom >> 24 == self._top >> 24:
            self._bottom = self._bottom * 256 % 2**32
            self._top = self._top * 256 % 2**32 + 255
            self._value = self._value * 256 % 2**32 + next(self._data)
        for key in keys:
            a, n = self._counters[key]
            goal = 2**19 - 1 if bit else -(2**19)
            self._counters[key] = a + (goal - a) * (131072 // (2 * n + 3)) // 65536, min(n + 1, 255)
        return bit


class CompactTables(Decisions):
    """The tables of codec 9."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data[1:] + bytes(8), 0, 0)
        self._columns = data[0] + 1
        self._value = int.from_bytes([next(self._data) for _ in range(4)], "big")
        self._data = itertools.chain(self._data, itertools.repeat(0))

    def rows(self, contexts: int) -> list[list[int]]:
        """Return the levels of each context."""
        above, rows = [0] * 264, []
        for _ in range(contexts):
            above = self._row(above)
            rows.append(above)
        return rows

    def _yes(self, one: int, two: int) -> int:
        return self._decide([(0, one), (1, two)])

    def _row(self, above: list[int]) -> list[int]:
        row, last = [0] * 264, 24
        if not self._yes(0, 0):
            return row
        for s in range(self._columns):
            u, f, left = above[s], above[s + 8] if s + 8 < 256 else 0, row[s - 4] if s > 3 else 0
            w = row[s - 2] if s & 2 else 0
            near = s % 4 + 4 * (u > 0) + 8 * (left > 0) + 16 * (f > 0) + 32 * (w > 0)
            if not self._yes(1 + s, 1 + near):
                continue
            level, c, i = (w, s - 2, 0) if w else (left, s - 4, 1) if left else (last, s, 2)
            g = 16
            if i < 2 and u and above[c]:
                g = min(max(u - above[c], -8), 7) + 8
            p, q = 257 + 32 * i, 65 + 32 * g
            if self._yes(p, q):
                d, n = self._yes(p + 1, q + 1), 1
                while n < 50:
                    x = 1 + min(n, 10) + 10 * d
                    if not self._yes(p + x, q + x):
                        break
                    n += 1
                level += -min(n, 49) if d else min(n, 49)
            row[s] = last = level
        return row
