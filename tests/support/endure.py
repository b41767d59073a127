"""Decode damaged payloads of every codec in a process that must not crash.

Example::

    python -m tests.support.endure SEED COUNT        # prints which loops ran, and "alive"
"""

from __future__ import annotations

import contextlib
import random
import sys

import numpy as np

from msft_store.codec import codecs
from msft_store.codec.codecs import compiled_kernels
from msft_store.format.dtypes import dtype_by_name
from tests.support.pairs import encode_with

LANES = 5000


def endure(seed: int, count: int) -> None:
    """Decode each codec's payload with a few bytes changed or cut off, ``count`` times."""
    rng = random.Random(seed)  # noqa: S311
    for code in sorted(set(range(10)) - {codecs.SAME.code}):
        for name in ("bfloat16", "float32"):
            dtype = dtype_by_name(name)
            weights = 0.02 * np.random.RandomState(code).standard_normal(LANES)
            lanes = weights.astype(np.float32).view(np.uint32) >> (16 if name == "bfloat16" else 0)
            old = lanes.astype(f"<u{dtype.size}")
            new = old.copy()
            new[::37] += 1
            chunk, reference = new.view(np.uint8), old.view(np.uint8)
            payload = encode_with(codecs.codec_by_code(code), chunk, reference, dtype)
            for _ in range(count):
                bad = bytearray(payload)
                for _ in range(rng.randint(1, 3)):
                    bad[rng.randrange(len(bad))] = rng.randrange(256)
                end = rng.choice([len(bad), rng.randrange(len(bad) + 1)])
                with contextlib.suppress(ValueError):
                    codecs.codec_by_code(code).decode_into(
                        bytes(bad[:end]), reference.copy(), dtype
                    )


if __name__ == "__main__":
    endure(int(sys.argv[1]), int(sys.argv[2]))
    print("compiled" if compiled_kernels() is not None else "plain", "alive")
