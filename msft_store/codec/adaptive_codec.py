"""Codec 7, which is only read: the changes of codec 6, coded with adaptive probabilities.

``docs/FORMAT.md``, section 5, has the format. The chunk is the same with and without compiled
kernels, and a damaged payload is a :class:`ValueError`.

Example::

    decode_in_place(payload, old, layout, compiled_kernels())   # old is now equal to new
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec import arithmetic_coder, exponent_codec
from msft_store.codec.changes import (
    DIRECT_TOKENS,
    EXTRA_BITS,
    GAP_CONTEXT,
    RUN_CONTEXT,
    SMALLEST,
    FloatLayout,
)
from msft_store.codec.kernels import Lanes

Array = NDArray[Any]


FINE_BITS = np.repeat(EXTRA_BITS, 2)
FINE_BITS[2 * DIRECT_TOKENS :] -= 1
"""Number of low bits that follow each token and half."""
FINE_SMALLEST = np.repeat(SMALLEST, 2)
FINE_SMALLEST[2 * DIRECT_TOKENS + 1 :: 2] += np.uint32(1) << FINE_BITS[2 * DIRECT_TOKENS + 1 :: 2]
"""The smallest distance of each token and half."""


def decode_in_place(payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any) -> None:
    """Replace the reference in ``old`` by the decoded lanes; an error leaves ``old`` undefined."""
    exponent_codec.decode_in_place(payload, old, layout, compiled, _ArithmeticReader)


class _ArithmeticReader:
    tokens = (FINE_BITS, FINE_SMALLEST)

    def __init__(self, first: bytes, rest: bytes, low: int, high: int, compiled: Any) -> None:
        self._first, self._rest, self._low, self._high = first, rest, low, high
        self._compiled = compiled

    def read_runs_and_gaps(self, contexts: Array) -> Array:
        return _decode_symbols(self._first, contexts, RUN_CONTEXT, GAP_CONTEXT, self._compiled)

    def read_changes(self, exponents: Array) -> Array:
        return _decode_symbols(self._rest, exponents, self._low, self._high, self._compiled)


def _decode_symbols(data: bytes, exponents: Array, low: int, high: int, compiled: Any) -> Array:
    symbols, used = np.zeros(exponents.size, np.int16), 0
    if symbols.size:
        coded = np.frombuffer(bytearray(data), np.uint8)
        used = code(False, coded, (exponents, low, high), symbols, compiled)
    if used != len(data):
        raise ValueError("an adaptive chunk has the wrong length")
    return symbols.astype(np.uint16)


def code(
    encoding: bool, data: Array, given: tuple[Array, int, int], symbols: Array, compiled: Any
) -> int:
    """Run the coder on the exponents, ``low`` and ``high`` in ``given``; return the bytes used."""
    exponents, low, high = given
    counters, rates = arithmetic_coder.make_counters(), arithmetic_coder.RATES
    used: int
    if compiled is not None:
        wide = exponents.astype(np.int16)
        used = compiled.code_symbols(encoding, data, wide, low, high, symbols, *counters, rates)
        return used
    # Interpreted code is much faster on lists than on arrays, and their integers never overflow.
    one, other = ([0] * counter.size for counter in counters)
    coded = symbols.tolist()
    used = arithmetic_coder.code_symbols(
        encoding, data.data, exponents.tolist(), low, high, coded, one, other, rates.tolist()
    )
    symbols[:] = coded
    return used
