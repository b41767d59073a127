"""No payload crashes the adaptive codec, takes much memory, or divides the implementations."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store.codec import adaptive_codec, exponent_codec, kernels
from msft_store.codec.kernels import Lanes
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from tests.support.older_encoders import append_halves, encode_symbols
from tests.support.pairs import BF16, DTYPES, SEEDED, check, outcomes, pair_of

HEADER = "<5IBBH"


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_any_flipped_or_missing_byte_is_refused_or_gives_other_content(name: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    new, old = pair_of(dtype, 400, "trained", 4)
    payload = check(dtype, new, old, adaptive_codec)
    assert 40 < len(payload) < 200
    for at in range(len(payload)):
        flipped = [
            payload[:at] + bytes([payload[at] ^ bits]) + payload[at + 1 :] for bits in (1, 255)
        ]
        for damaged in (*flipped, payload[:at], payload[:at] + payload[at + 1 :]):
            one, other = outcomes(damaged, old, dtype, adaptive_codec)
            assert one == other


@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 300),
    head=st.tuples(
        *[st.integers(0, 20)] * 5, *[st.integers(0, 255)] * 2, st.integers(0, 2**16 - 1)
    ),
    rest=st.binary(max_size=120),
)
@settings(SEEDED, max_examples=200)
def test_garbage_has_one_outcome(
    dtype: DType, count: int, head: tuple[int, ...], rest: bytes
) -> None:
    old = pair_of(dtype, count, "hostile", 1)[1]
    for payload in (rest, struct.pack(HEADER, *head) + rest):
        one, other = outcomes(payload, old, dtype, adaptive_codec)
        assert one == other


@pytest.mark.parametrize("field", range(8))
def test_a_header_that_lies_costs_no_memory(field: int) -> None:
    new, old = pair_of(BF16, 700, "trained", 4)
    payload = check(BF16, new, old, adaptive_codec)
    head = list(struct.unpack_from(HEADER, payload))
    most = (2**32 - 1,) * 5 + (255, 255, 2**16 - 1)
    tried = {0, 1, head[field] - 1, head[field] + 1, 700, 701, 1 << 15, most[field]}
    for value in (value for value in tried if 0 <= value <= most[field]):
        changed_head = head.copy()
        changed_head[field] = value
        tracemalloc.start()
        one, other = outcomes(
            struct.pack(HEADER, *changed_head) + payload[24:], old, BF16, adaptive_codec
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert one == other
        assert one == new.tobytes() or value != head[field]
        assert peak < 1 << 24


@pytest.fixture
def old() -> Lanes:
    """Return references of exponent 5: 300 of them, in three blocks."""
    return np.full(300, 5 << 7, "<i2")


def crafted(
    old: Lanes,
    *,
    runs: list[int] | None = None,
    gaps: tuple[int, ...] = (),
    changes: tuple[int, ...] = (),
    numbers: tuple[int, ...] = (),
    header: dict[int, int] | None = None,
    words: int = 0,
    tail: bytes = b"",
) -> list[bytes | None]:
    """Return the outcomes of a payload with crafted runs, gaps and changes.

    ``header`` replaces fields, ``words`` adds to the low bits or takes from them.
    """
    blocks = [] if runs is None else runs
    plain = np.array([*blocks, *gaps], np.uint32)
    coded = append_halves(exponent_codec.compute_plain_symbols(len(blocks), plain), plain)
    symbols, distances = np.array(changes, np.uint16), np.array(numbers, np.uint32)
    room, unused = np.zeros(plain.size + symbols.size + 2, np.uint32), np.zeros(512, np.int64)
    end = kernels.write_low_bits(coded, plain, adaptive_codec.FINE_BITS, unused, room, 0)
    end = kernels.write_low_bits(symbols, distances, adaptive_codec.FINE_BITS, unused, room, end)
    low_bits = room[: -(-end // 32)].tobytes()
    low_bits = low_bits[: len(low_bits) + min(4 * words, 0)] + bytes(max(4 * words, 0))
    kinds = np.repeat(np.array([0, 1]), [len(blocks), len(gaps)])
    first = encode_symbols(coded, kinds, 0, 1, None)
    second = encode_symbols(symbols, np.full(symbols.size, 5), 5, 5, None)
    busy = 0 if runs is not None else exponent_codec.ALL_BLOCKS_CODED
    head = [len(changes), len(gaps), len(blocks), len(first), len(low_bits) // 4, 5, 5, busy]
    for field, value in (header or {}).items():
        head[field] = value
    payload = struct.pack(HEADER, *head) + first + low_bits + second + tail
    return outcomes(payload, old, BF16, adaptive_codec)


def changed_positions(old: Lanes, found: list[bytes | None]) -> list[int]:
    one, other = found
    assert one is not None
    assert one == other
    return [int(at) for at in np.flatnonzero(np.frombuffer(one, old.dtype) != old)]


UP = (1 << 3,)
"""One step away from zero."""


def test_a_crafted_payload_that_fits_is_read(old: Lanes) -> None:
    one: dict[str, Any] = {"changes": UP, "numbers": (1,)}
    assert changed_positions(old, crafted(old, runs=[1, 1], gaps=(12,), **one)) == [140]
    assert changed_positions(old, crafted(old, runs=[2], gaps=(43,), **one)) == [299]
    assert changed_positions(old, crafted(old, gaps=(299,), **one)) == [299]
    assert (
        changed_positions(old, crafted(old)) == changed_positions(old, crafted(old, runs=[])) == []
    )


@pytest.mark.parametrize(
    "runs",
    [[3], [0, 4], [4, 0], [1, 1, 1], [0] * 4, [2**32 - 1] * 3, [2**31] * 3, [1, 2**32 - 1]],
    ids=str,
)
def test_runs_beyond_the_end_are_refused(old: Lanes, runs: list[int]) -> None:
    for changes in ((), UP):
        assert crafted(old, runs=runs, changes=changes, numbers=changes) == [None, None]


@pytest.mark.parametrize(
    ("runs", "gaps"),
    [
        (None, (300,)),
        (None, (383,)),
        (None, (384,)),
        (None, (2**32 - 1,)),
        (None, (0, 2**32 - 1)),
        (None, (2**31, 2**31)),
        (None, (2**32 - 2,) * 300),
        ([1, 1], (128,)),
        ([2], (44,)),
        ([2], (128,)),
        ([0, 1, 1], (172,)),
        ([], (0,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("listed", [0, 1, 2])
def test_gaps_beyond_the_coded_blocks_are_refused(
    old: Lanes, runs: list[int] | None, gaps: tuple[int, ...], listed: int
) -> None:
    found = crafted(old, runs=runs, gaps=gaps, changes=UP * listed, numbers=(1,) * listed)
    assert found == [None, None]


@pytest.mark.parametrize("token", [61, 62, 63])
@pytest.mark.parametrize("bits", range(8))
def test_the_farthest_tokens_stay_in_the_lane(old: Lanes, token: int, bits: int) -> None:
    changes = (token << 3 | bits,)
    found = crafted(old, gaps=(140,), changes=changes, numbers=(2**32 - 1,))
    assert set(changed_positions(old, found)) <= {140}


@pytest.mark.parametrize("token", [61, 62, 63])
def test_low_bits_that_are_missing_are_refused(old: Lanes, token: int) -> None:
    changes, numbers = (token << 3,) * 2, (2**32 - 1,) * 2
    for words in (-2, -1, 1):
        found = crafted(old, gaps=(1, 2), changes=changes, numbers=numbers, words=words)
        assert found == [None, None]


@pytest.mark.parametrize("count", [1, 2, 300])
def test_gaps_and_runs_without_their_low_bits_are_refused(old: Lanes, count: int) -> None:
    many = (2**32 - 1,) * count
    for words in (-count, -1):
        assert crafted(old, gaps=many, changes=UP, numbers=(1,), words=words) == [None, None]
        assert crafted(old, runs=list(many), words=words) == [None, None]


@pytest.mark.parametrize(
    "header",
    [
        {0: 0},
        {0: 2},
        {1: 0},
        {1: 301},
        {2: 1},
        {5: 6},
        {5: 0, 6: 64},
        {7: 257},
        {7: 6},
        {7: 6 | 1 << 15},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_rest_is_refused(old: Lanes, header: dict[int, int]) -> None:
    found = crafted(old, gaps=(140,), changes=UP, numbers=(1,), header=header)
    assert found == [None, None]


@pytest.mark.parametrize("tail", [bytes(1), bytes(4), b"\xff" * 4], ids=str)
def test_bytes_after_the_end_are_refused(old: Lanes, tail: bytes) -> None:
    assert crafted(old, gaps=(140,), changes=UP, numbers=(1,), tail=tail) == [None, None]
    assert crafted(old, tail=tail) == [None, None]


def test_a_gap_that_leads_to_a_busy_element_lists_it_once(old: Lanes) -> None:
    old[140] = 0
    one: dict[str, Any] = {
        "header": {7: exponent_codec.ALL_BLOCKS_CODED | 1},
        "changes": UP,
        "numbers": (1,),
    }
    assert changed_positions(old, crafted(old, gaps=(140,), **one)) == [140]
    assert crafted(old, gaps=(140, 3), **one) == [None, None]
