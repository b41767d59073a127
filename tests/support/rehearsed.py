"""Code chunks of all kinds after a rehearsal, in a process that has compiled nothing before.

Example::

    python -m tests.support.rehearsed        # prints "nothing is compiled", or what is
"""

from __future__ import annotations

import os

import numpy as np

from msft_store.codec import changes, codecs, exponent_codec, rehearsal
from msft_store.codec.changes import ChunkChanges
from msft_store.codec.compilation import HERE, NUMBA_VARIABLE
from msft_store.codec.kernels import Bytes
from msft_store.format.dtypes import DTYPES, DType
from tests.support.pairs import COMPILED, layout, pair_of


def signatures() -> set[str]:
    """Return all kinds of arguments that the loops of this process are compiled for."""
    return {
        f"{name} {signature}"
        for name, loop in vars(COMPILED).items()
        for signature in getattr(loop, "signatures", ())
    }


def code(dtype: DType) -> None:
    """Encode and decode chunks of a type that differ in size, content and access."""
    by_exponent = changes.float_layout(dtype) is not None
    for kind in ("hostile", "trained", "all"):
        for count in (1, 40_000):
            if by_exponent:
                new, old = pair_of(dtype, count, kind, 1)
                found = exponent_codec.find_changes(new, old, layout(dtype), None)
            else:
                old = np.random.default_rng(0).integers(0, 256, count * dtype.size, np.uint8)
                new, found = old ^ (old < 9), None
            chunk, old = new.view(np.uint8).copy(), old.view(np.uint8)
            round_trip(chunk, old, dtype, found)
            for writeable in (True, False):
                chunk.flags.writeable = writeable
                for reference in (old, None):
                    round_trip(chunk, reference, dtype)


def round_trip(
    chunk: Bytes,
    reference: Bytes | None,
    dtype: DType,
    found: ChunkChanges | None = None,
) -> None:
    """Encode and decode a chunk."""
    codec, payload = codecs.encode(chunk, reference, dtype, found=found)
    codec.decode_into(payload, chunk.copy() if reference is None else reference.copy(), dtype)


def main() -> None:
    """Code chunks after each part of a rehearsal, as far as they may be coded then."""
    os.environ[NUMBA_VARIABLE] = HERE
    compiled = set()
    for lane in rehearsal.rehearse_all():
        before = signatures()
        for dtype in DTYPES:
            if lane in (None, dtype.lane):
                code(dtype)
        compiled |= signatures() - before
    print("\n".join(sorted(compiled)) or "nothing is compiled")


if __name__ == "__main__":
    main()
