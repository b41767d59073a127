"""The adaptive codec restores every bit, and both implementations give the same bytes.

The chunks are small because interpreted code is slow.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store.codec import adaptive_codec
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from tests.support.older_encoders import encode_symbols
from tests.support.pairs import (
    BF16,
    COMPILED,
    DTYPES,
    KINDS,
    PATHS,
    SEEDED,
    Pair,
    changed,
    check,
    layout,
    packed,
    pair_of,
)
from tests.support.plain_codecs import Decisions, read_adaptive

CHANGES = [
    (token << 1 | half) << 2 | smaller << 1 | flipped
    for token in range(64)
    for half in range(2 if token >= 4 else 1)
    for smaller in range(2 if token else 1)
    for flipped in range(2)
]


@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
)
@settings(SEEDED, max_examples=100)
def test_both_implementations_give_the_same_bytes_and_restore_every_bit(
    dtype: DType, count: int, kind: str, seed: int
) -> None:
    check(dtype, *pair_of(dtype, count, kind, seed), adaptive_codec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_blocks_may_end_anywhere(dtype: DType, kind: str) -> None:
    for count in (127, 128, 129):
        check(dtype, *pair_of(dtype, count, kind, count), adaptive_codec)


@pytest.mark.parametrize("kind", ["trained", "one", "far apart"])
def test_many_blocks_may_end_anywhere(kind: str) -> None:
    for count in (128 * 256 - 1, 128 * 256, 128 * 256 + 1):
        check(BF16, *pair_of(BF16, count, kind, 1), adaptive_codec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_a_reader_written_from_the_format_page_agrees(dtype: DType, kind: str) -> None:
    for count in (1, 200, 3000):
        new, old = pair_of(dtype, count, kind, count)
        payload = packed(dtype, new, old, COMPILED, adaptive_codec)
        mantissa = layout(dtype).shift
        again = read_adaptive(payload, old.tobytes(), mantissa=mantissa, width=dtype.lane)
        assert again == new.tobytes()


@pytest.mark.parametrize("first_exponent", [0, 100, 255])
def test_every_change_after_every_movement_is_restored(first_exponent: int) -> None:
    rng = np.random.default_rng(first_exponent)
    symbols = rng.permutation(np.array(CHANGES * 4, np.uint16))
    exponents = rng.choice(np.array([0, 1, 100, 101, 254, 255], np.int16), symbols.size)
    ends = first_exponent, min(first_exponent + 63, 255)
    first, second = (encode_symbols(symbols, exponents, *ends, compiled) for compiled in PATHS)
    assert first == second
    for compiled in PATHS:
        assert np.array_equal(
            adaptive_codec._decode_symbols(first, exponents, *ends, compiled), symbols
        )
    read = Decisions(first, *ends).symbols(exponents.tolist())
    assert [(t << 1 | half) << 2 | smaller << 1 | s for t, s, smaller, half in read] == [*symbols]


@pytest.mark.parametrize("surprise", [2, 7])
def test_a_change_after_many_equal_symbols_is_restored(surprise: int) -> None:
    symbols = np.zeros(30_000, np.uint16)
    symbols[surprise::5000] = CHANGES[-1]
    exponents = np.full(symbols.size, 120, np.int16)
    first, second = (encode_symbols(symbols, exponents, 120, 120, compiled) for compiled in PATHS)
    assert first == second
    assert np.array_equal(
        adaptive_codec._decode_symbols(first, exponents, 120, 120, COMPILED), symbols
    )
    assert len(first) < 200


@pytest.mark.parametrize("compiled", PATHS, ids=["compiled", "interpreted"])
def test_unchanged_chunks_and_unaligned_addresses_are_coded(compiled: Any) -> None:
    dtype = dtypes.dtype_by_name("float32")
    new, old = pair_of(dtype, 1000, "trained", 1)
    shifted = []
    for lanes in (new, old):
        data = np.zeros(lanes.nbytes + 1, np.uint8)
        data[1:] = lanes.view(np.uint8)
        shifted.append(data[1:].view(lanes.dtype))
        shifted[-1].flags.writeable = False
    assert not shifted[0].flags.aligned
    for now, was in (shifted, (old, old)):
        payload = packed(dtype, now, was, compiled, adaptive_codec)
        restored = changed(payload, was, dtype, compiled, adaptive_codec)
        assert restored.tobytes() == now.tobytes()


def test_threads_change_no_byte() -> None:
    pairs = [pair_of(BF16, 20_000, kind, seed) for seed in range(3) for kind in KINDS]

    def code(pair: Pair) -> bytes:
        payload = packed(BF16, *pair, COMPILED, adaptive_codec)
        assert (changed(payload, pair[1], BF16, COMPILED, adaptive_codec) == pair[0]).all()
        return payload

    some = slice(None) if COMPILED is not None else slice(1, 4)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(code, pairs[some])) == [code(pair) for pair in pairs[some]]
