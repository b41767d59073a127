"""Codes small chunks in every way that calls a compiled loop, so that Numba compiles all of them.

:mod:`msft_store.codec.compilation` runs :func:`main` in a process of its own.

Example::

    list(rehearse_all())      # afterwards no chunk of any kind makes Numba compile anything
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np

from msft_store.codec import codecs, compilation
from msft_store.codec.kernels import Bytes
from msft_store.format.dtypes import DType, dtype_by_name

NAMES = ("bfloat16", "float32")
"""A type for each width of lanes, the more usual first."""
_SECONDS = 600
"""Time after which the process ends, whatever it waits for."""
_ELEMENTS = 1 << 14


def rehearse(name: str) -> None:
    """Encode and decode chunks of a type."""
    dtype = dtype_by_name(name)
    new, old = _make_pair(dtype)
    _round_trip(new, old, dtype)
    _round_trip(new, None, dtype)
    # References of zero have tokens of their own, for which loops take wider symbols.
    zero = old.copy()
    zero[: dtype.lane] = 0
    _round_trip(new, zero, dtype)


def rehearse_all() -> Iterator[int | None]:
    """Rehearse all; yield the bytes of the lanes that are done, and ``None`` after the last.

    What only codecs of older stores need is compiled where it is called.
    """
    for name in NAMES:
        rehearse(name)
        yield dtype_by_name(name).lane
    yield None


def main() -> None:
    """Compile all loops into Numba's cache, and record which it has."""
    signal.alarm(_SECONDS)
    for lane in rehearse_all():
        compilation.mark_compiled(lane)


def _make_pair(dtype: DType) -> tuple[Bytes, Bytes]:
    """Return weights of several exponents of which some have moved, and the weights before."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, _ELEMENTS).astype("<f4").view("<u4")
    old = (weights >> (32 - 8 * dtype.lane)).astype(f"<u{dtype.lane}")
    moved = rng.random(_ELEMENTS) < 0.1
    new = old + moved * rng.integers(1, 9, _ELEMENTS).astype(old.dtype)
    return new.view(np.uint8), old.view(np.uint8)


def _round_trip(new: Bytes, old: Bytes | None, dtype: DType) -> None:
    found = None if old is None else codecs.find_changes(new, old, dtype)
    codec, payload = codecs.encode(new, old, dtype, found=found)
    scratch, out = (np.empty_like(new) if old is None else old.copy() for _ in range(2))
    proven = codec.restores(payload, new, scratch, dtype, found)
    codec.decode_into(payload, out, dtype)
    if not proven or out.tobytes() != new.tobytes():
        raise ValueError(f"the {codec.name} codec did not restore a chunk of {dtype.name}")
