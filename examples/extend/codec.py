"""Add a codec: chunks in which all elements are equal, such as new biases or padded rows.

Run ``python examples/extend/codec.py``. To make it part of the store, see ``CONTRIBUTING.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msft_store.codec.codecs import Codec, encode
from msft_store.codec.kernels import Bytes
from msft_store.format.dtypes import DTYPES, DType


@dataclass(frozen=True)
class Constant:
    """The first element only: all others have the same bits."""

    code: int = 200
    name: str = "constant"
    needs_reference: bool = False

    def encode(self, chunk: Bytes, reference: Bytes | None, dtype: DType) -> bytes:
        """Return the payload; ``ValueError`` if the elements differ."""
        elements = chunk.reshape(-1, dtype.size)
        if not (elements == elements[0]).all():
            raise ValueError("the elements of the chunk differ")
        return elements[0].tobytes()

    def decode(self, payload: bytes, size: int, reference: Bytes | None, dtype: DType) -> Bytes:
        """Return the chunk; ``ValueError`` if the payload is damaged.

        The payload comes from a file, so check it before you take memory for the result.
        """
        if len(payload) != dtype.size or size % dtype.size:
            raise ValueError("a constant chunk has the wrong length")
        return np.tile(np.frombuffer(payload, np.uint8), size // dtype.size)


def main() -> None:
    """Compare the codec with the one that the store picks."""
    constant: Codec = Constant()
    dtype = next(dtype for dtype in DTYPES if dtype.name == "bfloat16")
    chunk = np.tile(np.array([0x80, 0x3F], np.uint8), 4096)
    payload = constant.encode(chunk, None, dtype)
    if not np.array_equal(constant.decode(payload, chunk.size, None, dtype), chunk):
        raise ValueError("the codec did not restore the chunk")
    best, other = encode(chunk, None, dtype)
    print(f"constant takes {len(payload)} bytes, {best.name} takes {len(other)}")


if __name__ == "__main__":
    main()
