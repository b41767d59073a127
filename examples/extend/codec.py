"""Add a codec: chunks in which all elements are equal, such as new biases or padded rows.

Run ``python examples/extend/codec.py``. To make it part of the store, see ``CONTRIBUTING.md``.
"""

from __future__ import annotations

import numpy as np

from msft_store.codec.codecs import Codec, encode
from msft_store.codec.kernels import Bytes
from msft_store.format.dtypes import DTYPES, DType


class Constant(Codec):
    """The first element only: all others have the same bits."""

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        """Return the payload; ``ValueError`` if the elements differ."""
        elements = chunk.reshape(-1, dtype.size)
        if not (elements == elements[0]).all():
            raise ValueError("the elements of the chunk differ")
        return elements[0].tobytes()

    def decode_into(self, payload: bytes, out: Bytes, dtype: DType) -> None:
        """Fill ``out`` with the chunk; ``ValueError`` if the payload is damaged.

        The payload comes from a file, so check it before you take memory for the result.
        """
        if len(payload) != dtype.size or out.size % dtype.size:
            raise ValueError("a constant chunk has the wrong length")
        out[:] = np.tile(np.frombuffer(payload, np.uint8), out.size // dtype.size)


def main() -> None:
    """Compare the codec with the one that the store picks."""
    constant = Constant(200, "constant")
    dtype = next(dtype for dtype in DTYPES if dtype.name == "bfloat16")
    chunk = np.tile(np.array([0x80, 0x3F], np.uint8), 4096)
    payload = constant.encode(chunk, None, dtype)
    restored = np.empty_like(chunk)
    constant.decode_into(payload, restored, dtype)
    if not np.array_equal(restored, chunk):
        raise ValueError("the codec did not restore the chunk")
    best, other = encode(chunk, None, dtype)
    print(f"constant takes {len(payload)} bytes, {best.name} takes {len(other)}")


if __name__ == "__main__":
    main()
