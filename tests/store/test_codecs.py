"""Every codec gives back every bit, and survives every payload."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store import dtypes
from msft_store.changes import layout_of
from msft_store.codecs import (
    CLASSES,
    DELTA,
    PLANES,
    RAW,
    SAME,
    SPARSE,
    ZSTD,
    Codec,
    by_code,
    decode,
    encode,
)
from msft_store.dtypes import DType
from msft_store.errors import VersionError
from msft_store.format import CHUNK_BYTES, inflate
from msft_store.kernels import Bytes

ALL = (RAW, ZSTD, PLANES, SAME, DELTA, SPARSE, CLASSES)
DTYPES = dtypes._TABLE
CASES = [(c, d) for c in ALL for d in DTYPES if c != CLASSES or layout_of(d) is not None]
LENGTHS = st.integers(1, 3000)
RELATIONS = st.sampled_from(("none", "equal", "few", "many", "unrelated"))


def chunk_of(dtype: DType, count: int, seed: int) -> Bytes:
    """Return random bit patterns with the awkward floats among them."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, count * dtype.size, dtype=np.uint8)
    if seed % 3 == 0:  # compressible
        data &= 3
    lanes = data.view(f"<u{dtype.lane}")
    bits = 8 * dtype.lane
    awkward = [0, 1, 1 << (bits - 1), (1 << bits) - 1, (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1]
    lanes[rng.integers(0, lanes.size, min(lanes.size, 12))] = rng.choice(
        np.array(awkward, lanes.dtype), min(lanes.size, 12)
    )
    return data


def reference_of(chunk: Bytes, dtype: DType, relation: str, seed: int) -> Bytes | None:
    if relation == "none":
        return None
    if relation == "unrelated":
        return chunk_of(dtype, chunk.size // dtype.size, seed + 1)
    reference = chunk.copy()
    share = {"equal": 0.0, "few": 0.03, "many": 0.6}[relation]
    lanes = reference.view(f"<u{dtype.lane}")
    rng = np.random.default_rng(seed)
    hit = rng.random(lanes.size) < share
    lanes[hit] += rng.integers(1, 4, int(hit.sum())).astype(lanes.dtype)
    return reference


@given(dtype=st.sampled_from(DTYPES), count=LENGTHS, relation=RELATIONS, seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_what_is_chosen_decodes_to_the_same_bits_and_is_never_larger_than_raw(
    dtype: DType, count: int, relation: str, seed: int
) -> None:
    chunk = chunk_of(dtype, count, seed)
    reference = reference_of(chunk, dtype, relation, seed)
    codec, payload = encode(chunk, reference, dtype)
    assert len(payload) <= chunk.size
    assert codec.needs_reference <= (reference is not None)
    restored = decode(codec.code, payload, chunk.size, reference, dtype)
    assert restored.tobytes() == chunk.tobytes()
    if relation == "equal":
        assert (codec, payload) == (SAME, b"")


@given(
    case=st.sampled_from([case for case in CASES if case[0] != SAME]),
    count=LENGTHS,
    relation=RELATIONS,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400, deadline=None)
def test_each_codec_gives_back_every_bit(
    case: tuple[Codec, DType], count: int, relation: str, seed: int
) -> None:
    codec, dtype = case
    chunk = chunk_of(dtype, count, seed)
    reference = reference_of(chunk, dtype, relation, seed)
    if reference is None and codec.needs_reference:
        reference = np.zeros_like(chunk)
    payload = codec.encode(chunk, reference, dtype)
    again = codec.decode(payload, chunk.size, reference, dtype)
    assert again.tobytes() == chunk.tobytes()
    assert codec.encode(chunk, reference, dtype) == payload


@pytest.mark.parametrize("relation", ["none", "few", "many"])
def test_a_full_chunk_round_trips(relation: str) -> None:
    dtype = dtypes.by_name("bfloat16")
    chunk = chunk_of(dtype, CHUNK_BYTES // 2, 5)
    reference = reference_of(chunk, dtype, relation, 5)
    codec, payload = encode(chunk, reference, dtype)
    assert decode(codec.code, payload, chunk.size, reference, dtype).tobytes() == chunk.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_every_change_between_two_values_of_a_lane_is_kept(dtype: DType) -> None:
    bits = 8 * dtype.lane
    edges = sorted({(k + d) % (1 << bits) for k in (0, 1 << (bits - 1)) for d in range(-3, 4)})
    values = np.array(edges, f"<u{dtype.lane}")
    chunk = np.tile(np.repeat(values, values.size), 2).view(np.uint8)
    reference = np.tile(np.tile(values, values.size), 2).view(np.uint8)
    for codec in (codec for codec, served in CASES if served == dtype and codec != SAME):
        payload = codec.encode(chunk, reference, dtype)
        again = codec.decode(payload, chunk.size, reference, dtype)
        assert again.tobytes() == chunk.tobytes()


@given(
    case=st.sampled_from(CASES),
    count=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    damage=st.sampled_from(("cut", "flip", "extend", "noise")),
    where=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_payload_is_a_value_error_or_other_bytes_of_the_right_size(
    *, case: tuple[Codec, DType], count: int, seed: int, damage: str, where: float
) -> None:
    codec, dtype = case
    chunk = chunk_of(dtype, count, seed)
    reference = reference_of(chunk, dtype, "few", seed)
    payload = bytearray(codec.encode(chunk, reference, dtype))
    at = int(where * len(payload))
    if damage == "cut":
        del payload[at:]
    elif damage == "flip" and payload:
        payload[at] ^= 1 << (seed % 8)
    elif damage == "extend":
        payload += bytes(1 + at)
    else:
        payload[:] = np.random.default_rng(seed).bytes(len(payload))
    try:
        decoded = decode(codec.code, bytes(payload), chunk.size, reference, dtype)
    except ValueError:
        return
    assert decoded.size == chunk.size


@pytest.mark.parametrize("codec", [SAME, DELTA, SPARSE, CLASSES], ids=lambda c: c.name)
def test_a_reference_of_another_size_is_refused(codec: Codec) -> None:
    dtype = dtypes.by_name("float32")
    chunk = chunk_of(dtype, 100, 1)
    payload = codec.encode(chunk, chunk.copy(), dtype)
    for reference in (None, chunk[:-4]):
        with pytest.raises(ValueError, match="reference"):
            codec.decode(payload, chunk.size, reference, dtype)


def test_a_frame_that_lies_about_its_size_costs_no_more_than_the_chunk() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    for size in (1 << 10, 1 << 20):
        with pytest.raises(ValueError, match="longer"):
            inflate(bomb, size)
    with pytest.raises(ValueError, match="early"):
        inflate(zstandard.ZstdCompressor().compress(bytes(100)), 101)


@pytest.mark.parametrize(
    ("count", "gaps"),
    [(5, [0] * 5), (1, [4]), (3, [0, 2**32 - 1, 0]), (2**31, []), (4, [0, 0, 0, 1])],
)
def test_sparse_changes_that_do_not_fit_the_chunk_are_refused(count: int, gaps: list[int]) -> None:
    dtype = dtypes.by_name("bfloat16")
    reference = np.zeros(2 * 4, np.uint8)
    planes = np.array(gaps, "<u4").view(np.uint8).reshape(-1, 4).T.tobytes() + bytes(2 * len(gaps))
    payload = struct.pack("<I", count) + zstandard.ZstdCompressor().compress(planes)
    with pytest.raises(ValueError, match="sparse"):
        SPARSE.decode(payload, reference.size, reference, dtype)


def test_classes_are_for_floats_of_two_and_four_bytes() -> None:
    for dtype in (dtype for dtype in DTYPES if (CLASSES, dtype) not in CASES):
        with pytest.raises(ValueError, match=dtype.name):
            CLASSES.encode(bytes_of(16), bytes_of(16), dtype)
        with pytest.raises(ValueError, match=dtype.name):
            CLASSES.decode(bytes(24), 16, bytes_of(16), dtype)


def bytes_of(count: int) -> Bytes:
    return np.zeros(count, np.uint8)


def test_an_unknown_codec_is_refused_by_number() -> None:
    with pytest.raises(VersionError, match="200"):
        by_code(200)
