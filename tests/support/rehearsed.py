"""Code chunks of all kinds after a rehearsal, in a process that has compiled nothing before.

Example::

    python -m tests.support.rehearsed        # prints "nothing is compiled", or what is
"""

from __future__ import annotations

import numpy as np

from msft_store.codec import changes, codecs, exponent_codec, rehearsal
from msft_store.codec.changes import ChunkChanges
from msft_store.format.dtypes import DTYPES, DType
from tests.support.pairs import COMPILED, KINDS, layout, pair_of


def signatures() -> set[str]:
    """Return all kinds of arguments that the loops of this process are compiled for."""
    return {
        f"{name} {signature}"
        for name, loop in vars(COMPILED).items()
        for signature in getattr(loop, "signatures", ())
    }


def code(new: np.ndarray, old: np.ndarray, dtype: DType, found: ChunkChanges | None = None) -> None:
    """Encode and decode a chunk at each level, with its reference and without one."""
    for level in codecs.LEVELS:
        for reference in (old, None):
            codec, payload = codecs.encode(new, reference, dtype, level=level, found=found)
            codec.decode_into(payload, old.copy(), dtype)


def main() -> None:
    """Code chunks that differ in type, size, content and access."""
    rehearsal.rehearse()
    before = signatures()
    for dtype in DTYPES:
        by_exponent = changes.float_layout(dtype) is not None
        for kind in KINDS if by_exponent else ("noise",):
            for count in (1, 129, 5000, 40_000):
                if by_exponent:
                    new, old = pair_of(dtype, count, kind, 1)
                    found = exponent_codec.find_changes(new, old, layout(dtype), None)
                    code(new.view(np.uint8), old.view(np.uint8), dtype, found)
                else:
                    old = np.random.default_rng(0).integers(0, 256, count * dtype.size, np.uint8)
                    new = old ^ (old < 9)
                chunk, reference = new.view(np.uint8).copy(), old.view(np.uint8)
                code(chunk, reference, dtype)
                chunk.flags.writeable = False
                code(chunk, reference, dtype)
    print("\n".join(sorted(signatures() - before)) or "nothing is compiled")


if __name__ == "__main__":
    main()
