"""Every codec restores every bit, and no payload crashes it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store.codec.changes import float_layout
from msft_store.codec.codecs import (
    ADAPTIVE,
    COMPACT,
    DELTA,
    EXPONENT_CLASSES,
    PLANES,
    RAW,
    SAME,
    SPARSE,
    TURNED,
    ZSTD,
    Codec,
    codec_by_code,
    encode,
)
from msft_store.codec.kernels import Bytes
from msft_store.errors import VersionError
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from msft_store.format.layout import CHUNK_BYTES, decompress
from tests.support.pairs import BF16, PATHS, encode_with, pair_of, restore
from tests.support.plain_codecs import read_turned

BY_EXPONENT = (EXPONENT_CLASSES, ADAPTIVE, COMPACT)
ALL = (RAW, ZSTD, PLANES, SAME, DELTA, SPARSE, TURNED, *BY_EXPONENT)
DTYPES = dtypes.DTYPES
CASES = [(c, d) for c in ALL for d in DTYPES if c not in BY_EXPONENT or float_layout(d) is not None]
TURNED_DTYPES = [d for d in DTYPES if d.floating]
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


@given(
    dtype=st.sampled_from(DTYPES),
    count=LENGTHS,
    relation=RELATIONS,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400, deadline=None)
def test_the_chosen_codec_restores_every_bit_and_is_never_larger_than_raw(
    *, dtype: DType, count: int, relation: str, seed: int
) -> None:
    chunk = chunk_of(dtype, count, seed)
    reference = reference_of(chunk, dtype, relation, seed)
    codec, payload = encode(chunk, reference, dtype)
    assert len(payload) <= chunk.size
    assert codec.needs_reference <= (reference is not None)
    restored = restore(codec, payload, chunk.size, reference, dtype)
    assert restored.tobytes() == chunk.tobytes()
    if relation == "equal":
        assert (codec, payload) == (SAME, b"")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_every_type_is_restored(dtype: DType) -> None:
    for seed, relation in enumerate(("none", "equal", "few", "many", "unrelated")):
        for count in (1, 10_000):
            chunk = chunk_of(dtype, count, seed)
            reference = reference_of(chunk, dtype, relation, seed)
            codec, payload = encode(chunk, reference, dtype)
            again = restore(codec, payload, chunk.size, reference, dtype)
            assert again.tobytes() == chunk.tobytes()


@given(
    case=st.sampled_from([case for case in CASES if case[0] != SAME]),
    count=LENGTHS,
    relation=RELATIONS,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400, deadline=None)
def test_each_codec_restores_every_bit(
    case: tuple[Codec, DType], count: int, relation: str, seed: int
) -> None:
    codec, dtype = case
    chunk = chunk_of(dtype, count, seed)
    reference = reference_of(chunk, dtype, relation, seed)
    if reference is None and codec.needs_reference:
        reference = np.zeros_like(chunk)
    payload = encode_with(codec, chunk, reference, dtype)
    again = restore(codec, payload, chunk.size, reference, dtype)
    assert again.tobytes() == chunk.tobytes()
    assert encode_with(codec, chunk, reference, dtype) == payload


@pytest.mark.parametrize("relation", ["none", "few", "many"])
def test_a_full_chunk_round_trips(relation: str) -> None:
    dtype = dtypes.dtype_by_name("bfloat16")
    chunk = chunk_of(dtype, CHUNK_BYTES // 2, 5)
    reference = reference_of(chunk, dtype, relation, 5)
    codec, payload = encode(chunk, reference, dtype)
    assert restore(codec, payload, chunk.size, reference, dtype).tobytes() == chunk.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_every_change_between_two_values_of_a_lane_is_kept(dtype: DType) -> None:
    bits = 8 * dtype.lane
    edges = sorted({(k + d) % (1 << bits) for k in (0, 1 << (bits - 1)) for d in range(-3, 4)})
    values = np.array(edges, f"<u{dtype.lane}")
    chunk = np.tile(np.repeat(values, values.size), 2).view(np.uint8)
    reference = np.tile(np.tile(values, values.size), 2).view(np.uint8)
    for codec in (codec for codec, served in CASES if served == dtype and codec != SAME):
        payload = encode_with(codec, chunk, reference, dtype)
        again = restore(codec, payload, chunk.size, reference, dtype)
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
    payload = bytearray(encode_with(codec, chunk, reference, dtype))
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
        decoded = restore(codec, bytes(payload), chunk.size, reference, dtype)
    except ValueError:
        return
    assert decoded.size == chunk.size


@pytest.mark.parametrize("codec", [DELTA, SPARSE, COMPACT], ids=lambda c: c.name)
def test_a_reference_of_another_size_is_refused(codec: Codec) -> None:
    dtype = dtypes.dtype_by_name("float32")
    chunk = chunk_of(dtype, 100, 1)
    for reference in (None, chunk[:-4]):
        with pytest.raises(ValueError, match="reference"):
            codec.encode(chunk, reference, dtype)


def test_a_frame_that_lies_about_its_size_costs_no_more_than_the_chunk() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    for size in (1 << 10, 1 << 20):
        with pytest.raises(ValueError, match="longer"):
            decompress(bomb, size)
    with pytest.raises(ValueError, match="early"):
        decompress(zstandard.ZstdCompressor().compress(bytes(100)), 101)


@pytest.mark.parametrize(
    ("count", "gaps"),
    [(5, [0] * 5), (1, [4]), (3, [0, 2**32 - 1, 0]), (2**31, []), (4, [0, 0, 0, 1])],
)
def test_sparse_changes_that_do_not_fit_the_chunk_are_refused(count: int, gaps: list[int]) -> None:
    dtype = dtypes.dtype_by_name("bfloat16")
    reference = np.zeros(2 * 4, np.uint8)
    planes = np.array(gaps, "<u4").view(np.uint8).reshape(-1, 4).T.tobytes() + bytes(2 * len(gaps))
    payload = struct.pack("<I", count) + zstandard.ZstdCompressor().compress(planes)
    with pytest.raises(ValueError, match="sparse"):
        SPARSE.decode_into(payload, reference, dtype)


@pytest.mark.parametrize("codec", BY_EXPONENT, ids=lambda c: c.name)
def test_exponent_codecs_refuse_other_types_than_floats_of_two_and_four_bytes(codec: Codec) -> None:
    for dtype in (dtype for dtype in DTYPES if (codec, dtype) not in CASES):
        if codec is COMPACT:
            with pytest.raises(ValueError, match=dtype.name):
                codec.encode(bytes_of(16), bytes_of(16), dtype)
        with pytest.raises(ValueError, match=dtype.name):
            codec.decode_into(bytes(24), bytes_of(16), dtype)


@pytest.mark.parametrize("dtype", TURNED_DTYPES, ids=lambda d: d.name)
def test_turned_lanes_are_the_same_in_every_implementation_and_by_the_format_page(
    monkeypatch: pytest.MonkeyPatch, dtype: DType
) -> None:
    for count in (1, 2, 3, 1000):
        chunk = chunk_of(dtype, count, count)
        chunk.flags.writeable = False
        payloads = []
        for compiled in PATHS:
            monkeypatch.setattr(
                "msft_store.codec.codecs.compiled_kernels", lambda _, compiled=compiled: compiled
            )
            payloads.append(TURNED.encode(chunk, None, dtype))
            for payload in payloads:
                again = restore(TURNED, payload, chunk.size, None, dtype)
                assert again.tobytes() == chunk.tobytes()
        assert payloads[0] == payloads[1]
        assert read_turned(payloads[0], width=dtype.lane) == chunk.tobytes()


@pytest.mark.parametrize("compiled", PATHS, ids=["compiled", "reference"])
@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_a_damaged_turned_payload_is_refused_or_gives_bytes_of_the_right_size(
    monkeypatch: pytest.MonkeyPatch, name: str, compiled: object
) -> None:
    monkeypatch.setattr("msft_store.codec.codecs.compiled_kernels", lambda _: compiled)
    dtype = dtypes.dtype_by_name(name)
    chunk = chunk_of(dtype, 40, 3)
    payload = TURNED.encode(chunk, None, dtype)
    for at in range(len(payload)):
        outcome(payload[:at] + bytes([payload[at] ^ 0xFF]) + payload[at + 1 :], chunk.size, dtype)
        assert outcome(payload[:at], chunk.size, dtype) is None
    for size in (0, dtype.lane, chunk.size - dtype.lane, chunk.size + dtype.lane, 1 << 22):
        assert outcome(payload, size, dtype) is None


def outcome(payload: bytes, size: int, dtype: DType) -> bytes | None:
    try:
        decoded = restore(TURNED, payload, size, None, dtype)
    except ValueError:
        return None
    assert decoded.size == size
    return decoded.tobytes()


def pair_of_bytes(dtype: DType, count: int, kind: str, seed: int = 1) -> tuple[Bytes, Bytes]:
    new, old = pair_of(dtype, count, kind, seed)
    return new.view(np.uint8), old.view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_an_equal_chunk_has_an_empty_payload(dtype: DType) -> None:
    chunk = chunk_of(dtype, 50, 1)
    assert encode(chunk, chunk.copy(), dtype) == (SAME, b"")


@pytest.mark.parametrize("kind", ["one", "far apart", "trained"])
@pytest.mark.parametrize("count", [4, 60, 3000, 10_000])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_the_smallest_codec_is_chosen_for_few_changes(name: str, count: int, kind: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    chunk, reference = pair_of_bytes(dtype, count, kind)
    tried = [RAW, SPARSE]
    # A codec with tables is only tried for chunks that are large enough.
    tried += [COMPACT] if chunk.size >= 512 else []
    # For larger chunks the delta codec is not tried, because it is slow.
    tried += [DELTA] if 512 <= chunk.size < 8192 else []
    sizes = {codec: len(codec.encode(chunk, reference, dtype)) for codec in tried}
    codec, payload = encode(chunk, reference, dtype)
    assert len(payload) == sizes[codec] == min(sizes.values())


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "complex64"])
def test_a_chunk_unlike_its_reference_is_coded_alone(name: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    weights, _ = pair_of_bytes(dtype, 20_000, "all")
    others = pair_of_bytes(dtype, 20_000, "all", 2)[1]
    noise = chunk_of(dtype, weights.size // dtype.size, 1)
    repeated = np.tile(noise[: noise.size // 25], 25)
    for reference in (None, others, chunk_of(dtype, noise.size // dtype.size, 4)):
        codec, payload = encode(weights, reference, dtype)
        assert (codec, payload) == (TURNED, TURNED.encode(weights, None, dtype))
        assert encode(noise, reference, dtype) == (RAW, noise.tobytes())
        codec, payload = encode(repeated, reference, dtype)
        assert codec in {TURNED, PLANES, ZSTD}
        assert len(payload) < 0.05 * repeated.size


@pytest.mark.parametrize("kind", ["trained", "all", "one class"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_codecs_that_are_only_read_were_no_smaller(name: str, kind: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    for count in (10_000, 200_000):
        chunk, reference = pair_of_bytes(dtype, count, kind)
        payload = encode(chunk, reference, dtype)[1]
        assert len(payload) <= len(encode_with(EXPONENT_CLASSES, chunk, reference, dtype))
        assert len(payload) <= 1.04 * len(encode_with(ADAPTIVE, chunk, reference, dtype))


@pytest.mark.parametrize("name", ["bfloat16", "float32", "complex64", "float64"])
def test_a_turned_chunk_of_no_whole_lanes_is_refused(name: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    for size in {1, dtype.lane - 1, dtype.lane + 1, 2 * dtype.lane + 1}:
        payload = zstandard.ZstdCompressor().compress(bytes(size))
        with pytest.raises(ValueError, match="larger dtype"):
            TURNED.decode_into(payload, bytes_of(size), dtype)


@pytest.mark.parametrize("codec", [EXPONENT_CLASSES, ADAPTIVE], ids=lambda c: c.name)
def test_a_codec_that_is_only_read_says_so(codec: Codec) -> None:
    with pytest.raises(NotImplementedError, match="compact replaces it"):
        codec.encode(bytes_of(16), bytes_of(16), BF16)


def bytes_of(count: int) -> Bytes:
    return np.zeros(count, np.uint8)


def test_an_unknown_codec_is_refused_by_number() -> None:
    with pytest.raises(VersionError, match="200"):
        codec_by_code(200)
