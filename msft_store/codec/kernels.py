"""Inner loops of the codecs, on NumPy arrays.

NumPy releases the GIL and never starts threads of its own, so the pipeline alone decides how many
cores work. All functions are pure, and bijective where a codec needs it.

A chunk is seen as *lanes*: signed integers as wide as one element. Floats are ordered first: sign
and magnitude become two's complement. Neighbouring floats are then neighbouring integers, and a
small update is a small difference, whatever the exponent.

The low bits that tokens leave open form one little-endian stream of bits. ``bits`` and ``least``
are tables over tokens: the number of low bits, and the distance that they are added to. A symbol is
``token << 2 | towards zero << 1 | sign flipped``, with a context above the token if there is one.
:mod:`msft_store.codec.numba_kernels` compiles the same functions.

Example::

    change = encode_lane_changes(new_lanes, old_lanes, floating=True)     # zigzag-coded, unsigned
    assert (decode_lane_changes(change, old_lanes, floating=True) == new_lanes).all()
    end = write_low_bits(symbols, distances, bits, histogram, words, 0)
    same_distances, end = read_distances(symbols, words, 0, end, bits, least)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Lanes = NDArray[np.signedinteger]
Codes = NDArray[np.unsignedinteger]

_SIGNED: dict[int, np.dtype[Any]] = {width: np.dtype(f"<i{width}") for width in (1, 2, 4, 8)}
_UNSIGNED: dict[int, np.dtype[Any]] = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}


def view_lanes(data: Bytes, width: int) -> Lanes:
    """View little-endian bytes, shape ``(n * width,)``, as signed integers of ``width`` bytes."""
    viewed: Lanes = data.view(_SIGNED[width])
    return viewed


def _ordered(bits: Lanes) -> Lanes:
    # The function is its own inverse, because the sign bit selects the flip and is never flipped.
    width = bits.dtype.itemsize
    flip = bits.dtype.type((1 << (8 * width - 1)) - 1)
    ordered: Lanes = bits ^ ((bits >> (8 * width - 1)) & flip)
    return ordered


def encode_lane_changes(new: Lanes, old: Lanes, *, floating: bool) -> Codes:
    """Return the zigzag-coded change from ``old`` to ``new`` in steps of the format.

    0 is no change, 1 is one step down, 2 is one step up, and so on, modulo 2^bits.
    """
    change = _ordered(new) - _ordered(old) if floating else new - old
    bits = 8 * change.dtype.itemsize
    zigzag = (change << 1) ^ (change >> (bits - 1))
    codes: Codes = zigzag.view(_UNSIGNED[change.dtype.itemsize])
    return codes


def decode_lane_changes(codes: Codes, old: Lanes, *, floating: bool) -> Lanes:
    """Undo :func:`encode_lane_changes`."""
    change = (codes >> 1).view(old.dtype) ^ -((codes & 1).view(old.dtype))
    if floating:
        return _ordered(_ordered(old) + change)
    restored: Lanes = old + change
    return restored


def split_planes(values: Codes) -> Bytes:
    """Return all lowest bytes, then all next ones, and so on; shape ``(n * width,)``."""
    width = values.dtype.itemsize
    planes = np.empty((width, values.size), np.uint8)
    for number, plane in enumerate(planes):
        # Shifting and truncating is several times as fast as transposing.
        np.copyto(plane, values >> (8 * number) if number else values, casting="unsafe")
    return planes.reshape(-1)


def join_planes(planes: Bytes, width: int) -> Codes:
    """Undo :func:`split_planes`."""
    rows = planes.reshape(width, -1)
    values: Codes = rows[0].astype(_UNSIGNED[width])
    for number in range(1, width):
        values |= rows[number].astype(values.dtype) << (8 * number)
    return values


def split_rotated_planes(values: Codes, width: int) -> Bytes:
    """Return the planes of lanes rotated left by one bit, which puts exponents in the last one."""
    return split_planes((values << 1 | values >> (8 * width - 1)).astype(values.dtype))


def join_rotated_planes(planes: Bytes, values: Codes, width: int) -> None:
    """Undo :func:`split_rotated_planes`: fill ``values``."""
    rotated = join_planes(planes, width)
    values[:] = rotated >> 1 | rotated << (8 * width - 1)


def encode_gaps(positions: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the number of elements between each of the ascending positions and the one before."""
    return (np.diff(positions, prepend=-1) - 1).astype(np.uint32)


def decode_gaps(gaps: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Undo :func:`encode_gaps`."""
    positions: NDArray[np.int64] = np.cumsum(gaps.astype(np.int64) + 1) - 1
    return positions


def write_low_bits(
    symbols: Array, distances: Array, bits: Array, histogram: Array, words: Array, start: int
) -> int:
    """Count symbols in ``histogram`` and write low bits from bit ``start`` on; return their end.

    ``words`` (uint32) must have room for all bits, and zeros from ``start`` on.
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


def read_distances(
    symbols: Array, words: Array, start: int, end: int, bits: Array, least: Array
) -> tuple[Array, int]:
    """Return the distances of symbols, whose low bits begin at bit ``start``, and the end of these.

    ``words`` needs two words more than ``end``. Nothing is read beyond bit ``end``: if the low bits
    are longer, the returned end is beyond it and the distances are invalid.
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


def apply_changes(
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
    """Apply changes to the reference in ``new``; return the end of the low bits."""
    distances, at = read_distances(symbols, words, start, end, bits, least)
    steps = distances.astype(new.dtype)
    was = new[positions] ^ (symbols & 1).astype(new.dtype) * new.dtype.type(sign)
    new[positions] = np.where(symbols & 2, was - steps, was + steps)
    return at
