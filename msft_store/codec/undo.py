"""The way back from a decoded chunk to its reference: what the elements were that changed.

Invariant: it takes at most about the bytes of the chunk.

Example::

    undo = codec.decode_with_undo(payload, out, dtype)    # out was the reference, and is the chunk
    undo.apply(out)                                       # out is the reference again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.codec.kernels import Bytes, Lanes


@dataclass(frozen=True, kw_only=True)
class Undo:
    """Elements of the reference of a chunk."""

    positions: NDArray[Any] | None
    """The positions of the elements; ``None`` if all are given."""
    values: Lanes

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.values.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def apply(self, out: Bytes) -> None:
        """Replace the chunk in ``out`` by its reference."""
        lanes = out.view(self.values.dtype)
        lanes[... if self.positions is None else self.positions] = self.values


def make_undo(positions: NDArray[Any], values: Lanes, out: Bytes) -> Undo:
    """Return the way back from ``out``, which has other values at these positions."""
    undo = Undo(positions=positions, values=values)
    if undo.nbytes < out.nbytes:
        return undo
    whole = out.copy()
    undo.apply(whole)
    return Undo(positions=None, values=whole.view(values.dtype))


def compare(before: Bytes, out: Bytes, width: int) -> Undo:
    """Return the way back from ``out`` to ``before``, in lanes of ``width`` bytes."""
    old, new = before.view(f"<u{width}"), out.view(f"<u{width}")
    positions = np.flatnonzero(old != new)
    if positions.size * (positions.itemsize + width) >= out.nbytes:
        return Undo(positions=None, values=old)
    return Undo(positions=positions.astype(np.uint32), values=old[positions])
