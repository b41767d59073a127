"""Symbols with low bits: what a token leaves open, in one little-endian stream of bits, in NumPy.

The reference of what :mod:`msft_store.loops` compiles. ``bits`` and ``least`` are tables over
tokens: how many low bits follow, and the distance that they are added to; a symbol is
``token << 2 | towards zero << 1 | sign flipped``, with a context above the tokens where there is
one.

Example::

    end = gather(symbols, distances, bits, histogram, words, 0)
    again, end = distances_of(symbols, words, 0, end, bits, least)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def gather(
    symbols: Array, distances: Array, bits: Array, histogram: Array, words: Array, start: int
) -> int:
    """Count symbols, write the low bits of distances from bit ``start`` on, return the end.

    ``words``, uint32, has room for all, and zeros from ``start`` on.
    """
    histogram += np.bincount(symbols, minlength=histogram.size)
    counts = bits[symbols >> 2 & bits.size - 1].astype(np.uint64)
    ends = np.uint64(start) + np.cumsum(counts)
    at = ends - counts
    low = (distances & ((np.uint64(1) << counts) - np.uint64(1))) << (at & np.uint64(31))
    index = (at >> np.uint64(5)).astype(np.int64)
    np.bitwise_or.at(words, index, low.astype(np.uint32))
    carried = low >> np.uint64(32) != 0
    np.bitwise_or.at(words, index[carried] + 1, (low[carried] >> np.uint64(32)).astype(np.uint32))
    return int(ends[-1]) if ends.size else start


def distances_of(
    symbols: Array, words: Array, start: int, end: int, bits: Array, least: Array
) -> tuple[Array, int]:
    """Return the distances of symbols with low bits from ``start`` on, and where these end.

    ``words`` has two more than ``end`` needs. Nothing is read beyond bit ``end``; where the low
    bits end is then beyond it too, and the distances are worth nothing.
    """
    tokens = symbols >> 2
    counts = bits[tokens].astype(np.uint64)
    ends = np.uint64(start) + np.cumsum(counts)
    if ends.size == 0 or ends[-1] > end:
        return np.zeros(symbols.size, np.uint32), int(ends[-1]) if ends.size else start
    at = ends - counts
    word = (at >> np.uint64(5)).astype(np.int64)
    two = words[word] | words[word + 1].astype(np.uint64) << np.uint64(32)
    low = two >> (at & np.uint64(31)) & ((np.uint64(1) << counts) - np.uint64(1))
    distances: Array = (least[tokens] + low).astype(np.uint32)
    return distances, int(ends[-1])


def apply(
    new: Array,
    positions: Array,
    symbols: Array,
    words: Array,
    start: int,
    end: int,
    sign: int,
    bits: Array,
    least: Array,
) -> int:
    """Change elements of ``new``, which holds the reference; return where the low bits end."""
    distances, at = distances_of(symbols, words, start, end, bits, least)
    steps = distances.astype(new.dtype)
    was = new[positions] ^ (symbols & 1).astype(new.dtype) * new.dtype.type(sign)
    new[positions] = np.where(symbols & 2, was - steps, was + steps)
    return at
