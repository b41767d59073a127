"""Pairs of chunks and references for codecs 6, 7 and 9, from training-like to hostile.

Example::

    new, old = pair_of(BF16, 1000, "trained", seed=1)
    payload = check(BF16, new, old)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from hypothesis import settings

from msft_store.codec import adaptive_codec, codecs, compact_codec, exponent_codec
from msft_store.codec.changes import FloatLayout, float_layout
from msft_store.codec.kernels import Bytes, Lanes, view_lanes
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from tests.support.older_encoders import encode_adaptive, encode_classes, find_older_changes

DTYPES = [dtype for dtype in dtypes.DTYPES if float_layout(dtype) is not None]
BF16 = dtypes.dtype_by_name("bfloat16")
COMPILED = codecs.compiled_kernels()
PATHS = (COMPILED, None)
KINDS = ("hostile", "trained", "all", "one", "flipped", "one class", "far apart", "zeros")
SEEDED = settings(deadline=None, derandomize=True)

Pair = tuple[Lanes, Lanes]


def layout(dtype: DType) -> FloatLayout:
    found = float_layout(dtype)
    assert found is not None
    return found


def pair_of(dtype: DType, count: int, kind: str, seed: int) -> Pair:
    """Return new and reference lanes."""
    rng = np.random.default_rng(seed)
    unsigned, signed, sign = f"<u{dtype.lane}", f"<i{dtype.lane}", layout(dtype).sign
    if kind == "hostile":
        infinity = sign - (1 << layout(dtype).shift)
        awkward = [0, 1, sign - 1, infinity, infinity + 1, infinity - 1, 1 << layout(dtype).shift]
        patterns = np.array(awkward + [sign + bits for bits in awkward], unsigned)
        noise = rng.integers(0, 2 * sign, (2, count), dtype=np.uint64).astype(unsigned)
        new, old = np.where(rng.random((2, count)) < 0.5, noise, rng.choice(patterns, (2, count)))
        kept = rng.random(count) < rng.random()
        new[kept] = old[kept]
        return new.view(signed), old.view(signed)
    weights = torch.from_numpy(rng.normal(0, 0.02, count))
    if dtype.lane == 4:
        old = weights.float().numpy().view(unsigned)
    else:
        kept_as = torch.float16 if "16" not in dtype.name else dtype.torch
        old = weights.to(kept_as).view(torch.int16).numpy().view(unsigned)
    if kind == "one class":
        old = np.full(count, 3 << layout(dtype).shift, unsigned)
    if kind == "zeros":
        kept = rng.random(count) < 0.3
        new, old = np.where(rng.random(count) < 0.2, old >> (8 * dtype.lane - 4), old), old * kept
        return np.where(rng.random(count) < 0.3, old, new).view(signed), old.view(signed)
    new = old.copy()
    steps = (rng.normal(0, 3, count).astype(np.int64) | 1).astype(unsigned)
    if kind == "trained":
        hit = (rng.random(count) < 0.1) & (np.arange(count) // 300 % 3 == 0)
        new[hit] += steps[hit]
    elif kind in ("all", "one class"):
        new += steps
    elif kind == "flipped":
        new ^= (rng.random(count) < 0.3).astype(unsigned) * np.array(sign, unsigned)
    else:
        hit = rng.integers(0, count, 1) if kind == "one" else np.arange(count // 2, count, 1000)
        new[hit] += steps[hit]
    return new.view(signed), old.view(signed)


def packed(
    dtype: DType, new: Lanes, old: Lanes, compiled: Any, codec: ModuleType = compact_codec
) -> bytes:
    """Return the payload of a codec, with compiled kernels or without."""
    if codec is compact_codec:
        found = exponent_codec.find_changes(new, old, layout(dtype), compiled)
        return compact_codec.encode(found, layout(dtype), compiled)
    found = find_older_changes(new, old, layout(dtype), compiled)
    if codec is adaptive_codec:
        return encode_adaptive(old, layout(dtype), found, compiled)
    return encode_classes(found)


def check(dtype: DType, new: Lanes, old: Lanes, codec: ModuleType = compact_codec) -> bytes:
    """Assert that both implementations agree and restore every bit; return the payload."""
    first, second = (packed(dtype, new, old, compiled, codec) for compiled in PATHS)
    assert first == second
    for compiled in PATHS:
        assert changed(first, old, dtype, compiled, codec).tobytes() == new.tobytes()
    return first


def changed(
    payload: bytes, old: Lanes, dtype: DType, compiled: Any, codec: ModuleType = compact_codec
) -> Lanes:
    """Return the lanes that a payload decodes to."""
    new: Lanes = old.copy()
    codec.decode_in_place(payload, new, layout(dtype), compiled)
    return new


def encode_with(codec: codecs.Codec, chunk: Bytes, reference: Bytes, dtype: DType) -> bytes:
    """Return the payload of a codec, whether the store still writes it or not."""
    module = {6: exponent_codec, 7: adaptive_codec}.get(codec.code)
    if module is None:
        return codec.encode(chunk, reference, dtype)
    new, old = view_lanes(chunk, dtype.lane), view_lanes(reference, dtype.lane)
    return packed(dtype, new, old, COMPILED, module)


def restore(
    codec: codecs.Codec, payload: bytes, size: int, reference: Bytes | None, dtype: DType
) -> Bytes:
    """Return the bytes that a payload decodes to."""
    out: Bytes = np.zeros(size, np.uint8) if reference is None else reference.copy()
    codec.decode_into(payload, out, dtype)
    return out


def outcomes(
    payload: bytes, old: Lanes, dtype: DType, codec: ModuleType = compact_codec
) -> list[bytes | None]:
    """Return the decoded bytes of each implementation, or ``None`` if it refuses the payload."""
    found: list[bytes | None] = []
    for compiled in PATHS:
        try:
            decoded = changed(payload, old, dtype, compiled, codec)
        except ValueError:
            found.append(None)
        else:
            assert decoded.size == old.size
            found.append(decoded.tobytes())
    return found
