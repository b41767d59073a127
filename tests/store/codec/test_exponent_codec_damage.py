"""No payload crashes the exponent codec, takes much memory, or divides the implementations."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store.codec import exponent_codec
from msft_store.codec.changes import ChunkChanges
from msft_store.codec.kernels import Lanes
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from tests.support import pairs
from tests.support.older_encoders import encode_classes, find_older_changes
from tests.support.pairs import BF16, DTYPES, SEEDED, layout, pair_of

check = partial(pairs.check, codec=exponent_codec)
outcomes = partial(pairs.outcomes, codec=exponent_codec)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_any_flipped_or_missing_byte_is_refused_or_gives_other_content(name: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    new, old = pair_of(dtype, 700, "trained", 4)
    payload = check(dtype, new, old)
    assert len(payload) < 600
    for at in range(len(payload)):
        for damaged in (
            payload[:at],
            payload[:at] + bytes([payload[at] ^ 0xFF]) + payload[at + 1 :],
            payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :],
            payload[:at] + payload[at + 1 :],
        ):
            one, other = outcomes(damaged, old, dtype)
            assert one == other


@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 600),
    head=st.tuples(
        *[st.integers(0, 40)] * 5, *[st.integers(0, 255)] * 2, st.integers(0, 2**16 - 1)
    ),
    rest=st.binary(max_size=300),
)
@settings(SEEDED, max_examples=300)
def test_garbage_is_refused(dtype: DType, count: int, head: tuple[int, ...], rest: bytes) -> None:
    old = pair_of(dtype, count, "hostile", 1)[1]
    for payload in (rest, struct.pack("<5IBBH", *head) + rest):
        assert outcomes(payload, old, dtype) == [None, None]


@pytest.mark.parametrize("field", range(8))
def test_a_header_that_lies_costs_no_memory(field: int) -> None:
    new, old = pair_of(BF16, 700, "trained", 4)
    payload = check(BF16, new, old)
    head = list(struct.unpack_from("<5IBBH", payload))
    most = (2**32 - 1,) * 5 + (255, 255, 2**16 - 1)
    tried = {0, 1, head[field] - 1, head[field] + 1, 699, 700, 701, 1 << 15, most[field]}
    for value in (value for value in tried if 0 <= value <= most[field]):
        changed = head.copy()
        changed[field] = value
        tracemalloc.start()
        one, other = outcomes(struct.pack("<5IBBH", *changed) + payload[24:], old, BF16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert one == other
        assert one == new.tobytes() or value != head[field]
        assert peak < 1 << 24


def crafted(old: Lanes, found: ChunkChanges, **changed: Any) -> list[bytes | None]:
    """Return the outcomes of a payload with crafted changes."""
    return outcomes(encode_classes(replace(found, **changed)), old, BF16)


def with_tables(payload: bytes, rows: bytes) -> bytes:
    header = list(struct.unpack_from("<5IBBH", payload))
    after = payload[24 + header[3] :]
    frame = zstandard.ZstdCompressor().compress(rows)
    header[3] = len(frame)
    return struct.pack("<5IBBH", *header) + frame + after


@pytest.fixture
def old() -> Lanes:
    """Return references of exponent 5: 300 of them, in three blocks."""
    return np.full(300, 5 << 7, "<i2")


@pytest.fixture
def found(old: Lanes) -> ChunkChanges:
    """Return one change of a quiet element, at 140."""
    new = old.copy()
    new[140] += 9
    one = find_older_changes(new, old, layout(BF16), None)
    runs, quiet = np.array([1, 1]), np.array([12])
    assert crafted(old, one, runs=runs, gaps=quiet) == [new.tobytes()] * 2
    return replace(one, runs=runs, gaps=quiet)


@pytest.mark.parametrize(
    "runs",
    [
        [3],
        [0, 4],
        [4, 0],
        [1, 1, 1],
        [0, 0, 0, 0],
        [2**32 - 1] * 3,
        [2**31, 2**31, 2**31],
        [1, 2**32 - 1],
    ],
    ids=str,
)
def test_runs_beyond_the_end_are_refused(old: Lanes, found: ChunkChanges, runs: list[int]) -> None:
    assert crafted(old, found, runs=np.array(runs)) == [None, None]


@pytest.mark.parametrize(
    ("runs", "gaps"),
    [
        (None, [300]),
        (None, [383]),
        (None, [384]),
        (None, [2**32 - 1]),
        (None, [0, 2**32 - 1]),
        (None, [2**31, 2**31]),
        (None, [2**32 - 2] * 300),
        ([1, 1], [128]),
        ([2], [44]),
        ([2], [128]),
        ([0, 1, 1], [172]),
        ([], [0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("listed", [0, 1, 2])
def test_gaps_beyond_the_coded_blocks_are_refused(
    old: Lanes, found: ChunkChanges, runs: list[int] | None, gaps: list[int], listed: int
) -> None:
    assert crafted(
        old,
        found,
        runs=None if runs is None else np.array(runs, np.int64),
        gaps=np.array(gaps),
        symbols=np.repeat(found.symbols, listed),
        distances=np.repeat(found.distances, listed),
    ) == [None, None]


def test_the_last_element_of_a_short_block_can_be_reached(old: Lanes, found: ChunkChanges) -> None:
    one, other = crafted(old, found, runs=np.array([2]), gaps=np.array([43]))
    assert one == other
    assert one is not None
    assert np.flatnonzero(np.frombuffer(one, "<i2") != old).tolist() == [299]


def test_a_gap_that_leads_to_a_busy_element_lists_it_once(old: Lanes, found: ChunkChanges) -> None:
    old[140] = 0
    assert crafted(old, found, busy=1, low=0, high=0)[0] is not None
    assert crafted(old, found, busy=1, low=0, high=0, gaps=np.array([12, 3])) == [None, None]


@pytest.mark.parametrize("busy", [0, 5, 6, 255, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_every_limit_of_busy_exponents_fits_every_type(dtype: DType, busy: int) -> None:
    old = np.array([5 << layout(dtype).shift, -1, 0], f"<i{dtype.lane}")
    count = sum(exponent < busy for exponent in (5, layout(dtype).mask >> layout(dtype).shift, 0))
    found = ChunkChanges(
        busy=busy,
        low=0,
        high=0,
        runs=None,
        gaps=np.zeros(0, np.int64),
        symbols=np.full(count, 2 << 8 | 1 << 2, np.uint16),
        distances=np.ones(count, np.uint32),
    )
    one, other = outcomes(encode_classes(found), old, dtype)
    assert one == other
    assert one is not None
    assert np.count_nonzero(np.frombuffer(one, old.dtype) != old) == count


@pytest.mark.parametrize("token", [61, 62, 63])
@pytest.mark.parametrize("low_bits", [0, 2])
def test_the_farthest_tokens_stay_in_the_lane(
    old: Lanes, found: ChunkChanges, token: int, low_bits: int
) -> None:
    symbols = np.array([2 << 8 | token << 2 | low_bits], np.uint16)
    one, other = crafted(old, found, symbols=symbols, distances=np.array([2**32 - 1], np.uint32))
    assert one == other
    assert one is not None
    assert np.count_nonzero(np.frombuffer(one, "<i2") != old) <= 1


def test_a_context_without_a_table_is_refused(old: Lanes, found: ChunkChanges) -> None:
    elsewhere = np.array([2 << 8 | 1 << 2], np.uint16)
    assert crafted(old, found, low=4, high=5, symbols=elsewhere) == [None, None]


def test_runs_beside_the_mark_of_all_blocks_are_refused(old: Lanes, found: ChunkChanges) -> None:
    payload = bytearray(encode_classes(found))
    payload[23] |= 0x80
    assert outcomes(bytes(payload), old, BF16) == [None, None]


@pytest.mark.parametrize("extra", [-4, -1, 1, 2, 4])
def test_low_bits_and_words_fit_exactly(old: Lanes, found: ChunkChanges, extra: int) -> None:
    payload = encode_classes(found)
    if extra > 0:
        assert outcomes(payload + bytes(extra), old, BF16) == [None, None]
    else:
        assert outcomes(payload[:extra], old, BF16) == [None, None]
    header = list(struct.unpack_from("<5IBBH", payload))
    at = 24 + header[3] + 4 * header[4]
    if extra in (-4, 4):
        header[4] += extra // 4
        low_bits = payload[24 + header[3] : at]
        low_bits = low_bits + bytes(extra) if extra > 0 else low_bits[:extra]
        damaged = struct.pack("<5IBBH", *header) + payload[24 : 24 + header[3]] + low_bits
        assert outcomes(damaged + payload[at:], old, BF16) == [None, None]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 257), (4, 1), (2, 5), (3, 0)], ids=str)
def test_tables_of_another_shape_are_refused(
    old: Lanes, found: ChunkChanges, rows: int, columns: int
) -> None:
    payload = encode_classes(replace(found, low=5, high=5))
    assert outcomes(with_tables(payload, bytes(rows * columns)), old, BF16) == [None, None]


@pytest.mark.parametrize("level", [50, 255])
def test_levels_that_do_not_exist_are_refused(old: Lanes, found: ChunkChanges, level: int) -> None:
    payload = encode_classes(replace(found, low=5, high=5))
    assert outcomes(with_tables(payload, bytes([level, 0, 0])), old, BF16) == [None, None]


@given(levels=st.binary(min_size=3, max_size=768), seed=st.integers(0, 2**32))
@settings(SEEDED, max_examples=100)
def test_any_tables_have_the_same_outcome_in_both_implementations(levels: bytes, seed: int) -> None:
    new, old = pair_of(BF16, 300, "one class", seed)
    table = np.frombuffer(levels[: len(levels) // 3 * 3], np.uint8).reshape(3, -1) % 50
    steps = np.diff(table, axis=0, prepend=np.zeros((1, table.shape[1]), np.uint8))
    payload = encode_classes(find_older_changes(new, old, layout(BF16), None))
    one, other = outcomes(with_tables(payload, steps.tobytes()), old, BF16)
    assert one == other


def test_tables_that_decompress_without_end_are_refused(old: Lanes, found: ChunkChanges) -> None:
    payload = encode_classes(found)
    for rows in (bytes(1 << 26), bytes(257 * 3)):
        assert outcomes(with_tables(payload, rows), old, BF16) == [None, None]
