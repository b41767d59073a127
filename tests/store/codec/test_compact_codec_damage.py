"""No payload crashes codec 9, takes much memory, or divides the implementations."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store.codec import compact_codec, exponent_codec, rans, table_coder
from msft_store.codec.changes import ChunkChanges
from msft_store.codec.kernels import Lanes
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from tests.support.pairs import (
    BF16,
    COMPILED,
    DTYPES,
    PATHS,
    SEEDED,
    check,
    layout,
    outcomes,
    pair_of,
)


def split(payload: bytes) -> tuple[bytes, list[int], bytes]:
    """Return the fixed part of the header, its numbers, and the rest."""
    numbers, at = compact_codec._decode_numbers(payload, 4)
    return payload[:4], numbers, payload[at:]


def join(head: bytes, numbers: list[int], rest: bytes) -> bytes:
    return head + b"".join(map(compact_codec.encode_number, numbers)) + rest


@pytest.mark.parametrize(("name", "kind"), [("bfloat16", "zeros"), ("float32", "trained")])
def test_any_flipped_or_missing_byte_is_refused_or_gives_other_content(
    name: str, kind: str
) -> None:
    dtype = dtypes.dtype_by_name(name)
    new, old = pair_of(dtype, 500, kind, 4)
    payload = check(dtype, new, old)
    assert len(payload) < 1000
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
    head=st.binary(min_size=4, max_size=4),
    numbers=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    rest=st.binary(max_size=300),
)
@settings(SEEDED, max_examples=200)
def test_garbage_has_the_same_outcome_in_both_implementations(
    *, dtype: DType, count: int, head: bytes, numbers: list[int], rest: bytes
) -> None:
    old = pair_of(dtype, count, "hostile", 1)[1]
    for payload in (rest, join(head, numbers, rest)):
        one, other = outcomes(payload, old, dtype)
        assert one == other


@pytest.mark.parametrize("field", range(6))
def test_a_header_that_lies_costs_no_memory(field: int) -> None:
    new, old = pair_of(BF16, 700, "zeros", 4)
    head, numbers, rest = split(check(BF16, new, old))
    true = numbers[field]
    for value in {0, 1, max(true - 1, 0), true + 1, 700, 701, 1 << 15, 2**32 - 1, 2**35 - 1}:
        numbers[field] = value
        tracemalloc.start()
        one, other = outcomes(join(head, numbers, rest), old, BF16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert one == other
        assert one == new.tobytes() or value != true
        assert peak < 1 << 24


@pytest.fixture
def old() -> Lanes:
    """Return references of exponent 5, and one of zero at 7."""
    lanes = np.full(300, 5 << 7, "<i2")
    lanes[7] = 0
    return lanes


@pytest.fixture
def found(old: Lanes) -> ChunkChanges:
    """Return a change of each kind of reference."""
    new = old.copy()
    new[140] += 9
    new[7] = -77
    return exponent_codec.find_changes(new, old, layout(BF16), None)


def crafted(old: Lanes, found: ChunkChanges, **changed: Any) -> list[bytes | None]:
    """Return the outcomes of a payload with crafted changes."""
    payload = compact_codec.encode(replace(found, **changed), layout(BF16), None)
    return outcomes(payload, old, BF16)


@pytest.mark.parametrize("gaps", [[300, 0], [7, 2**32 - 1], [383], [], [7, 132, 0]], ids=str)
def test_gaps_beyond_the_end_or_of_another_number_are_refused(
    old: Lanes, found: ChunkChanges, gaps: list[int]
) -> None:
    assert crafted(old, found, gaps=np.array(found.gaps))[0] is not None
    assert crafted(old, found, gaps=np.array(gaps, np.int64)) == [None, None]


@pytest.mark.parametrize("extra", [b"\0", b"\0\0", b"\1\0"])
def test_bytes_after_the_end_are_refused(old: Lanes, found: ChunkChanges, extra: bytes) -> None:
    payload = compact_codec.encode(found, layout(BF16), None)
    assert outcomes(payload + extra, old, BF16) == [None, None]
    head, numbers, rest = split(payload)
    for field, at in ((3, numbers[3]), (4, numbers[3] + numbers[4])):
        longer = numbers.copy()
        longer[field] += len(extra)
        damaged = join(head, longer, rest[:at] + extra + rest[at:])
        one, other = outcomes(damaged, old, BF16)
        assert one == other
        assert one is None or field == 3


def test_a_number_of_too_many_bytes_is_refused(old: Lanes, found: ChunkChanges) -> None:
    head, numbers, rest = split(compact_codec.encode(found, layout(BF16), None))
    tail = b"".join(map(compact_codec.encode_number, numbers[1:])) + rest
    assert outcomes(head + bytes([numbers[0] | 128, 0]) + tail, old, BF16)[0] is not None
    assert outcomes(head + bytes([numbers[0] | 128] + [128] * 5) + tail, old, BF16) == [None, None]


def test_a_context_without_a_table_is_refused(old: Lanes, found: ChunkChanges) -> None:
    payload = compact_codec.encode(found, layout(BF16), None)
    head, numbers, rest = split(payload)
    empty = table_coder.encode_tables(np.zeros(256 * 4, np.uint8))
    rest, numbers[3] = empty + rest[numbers[3] :], len(empty)
    assert outcomes(join(head, numbers, rest), old, BF16) == [None, None]


@given(
    contexts=st.integers(1, 5),
    columns=st.integers(1, 256),
    seed=st.integers(0, 2**32),
    most=st.integers(1, 49),
)
@settings(SEEDED, max_examples=60)
def test_any_tables_are_restored_by_both_implementations(
    contexts: int, columns: int, seed: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    table = np.zeros((contexts, 256), np.uint8)
    table[:, :columns] = rng.integers(0, most + 1, (contexts, columns))
    table[rng.random(contexts) < 0.2] = 0
    levels = table.reshape(-1)
    data = table_coder.encode_tables(levels)
    assert (table_coder.decode_tables(data, contexts) == levels).all()
    if COMPILED is not None:
        given = levels.astype(np.int64)
        assert COMPILED.write_tables(given, data[0] + 1).tobytes() == data
        packed = COMPILED.read_tables(np.frombuffer(data, np.uint8), contexts)
        assert np.array_equal(packed, rans.compute_frequencies(levels))


@given(data=st.binary(max_size=200))
@settings(SEEDED, max_examples=100)
def test_any_bytes_are_the_same_tables_or_refused_by_both(data: bytes) -> None:
    readers: list[Callable[[], Any]] = [
        lambda: rans.compute_frequencies(table_coder.decode_tables(data, 9))
    ]
    if COMPILED is not None:
        readers.append(lambda: COMPILED.read_tables(np.frombuffer(data, np.uint8), 9))
    found = []
    for read in readers:
        try:
            found.append(read().tobytes())
        except ValueError:
            found.append(None)
    assert found[0] == found[-1]


@pytest.mark.skipif(PATHS[0] is None, reason="without compiled kernels a chunk is compared whole")
@pytest.mark.parametrize(("name", "kind"), [("bfloat16", "zeros"), ("float32", "trained")])
def test_only_a_payload_that_decodes_to_the_chunk_is_proven(name: str, kind: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    new, old = pair_of(dtype, 500, kind, 4)
    found = exponent_codec.find_changes(new, old, layout(dtype), PATHS[0])
    payload = compact_codec.encode(found, layout(dtype), PATHS[0])
    given = new.size, found, layout(dtype), PATHS[0]
    assert compact_codec.restores(payload, *given)
    for at in range(len(payload)):
        damaged = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        decodes = outcomes(damaged, old, dtype)[0] == new.tobytes()
        # A payload that lists another element, which stays as it is, is refused, too.
        assert compact_codec.restores(damaged, *given) <= decodes
    other = exponent_codec.find_changes(old, new, layout(dtype), PATHS[0])
    assert not compact_codec.restores(payload, new.size, other, layout(dtype), PATHS[0])
