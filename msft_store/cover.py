"""Do boxes cover a tensor, each element once? In time that grows with their number alone.

Each corner of a box counts 1 or -1, in turns along each dimension. A sum of boxes is told by these
counts, and so it equals the tensor if and only if its corners do. Dimensions along which no box
is cut are left out.

Example::

    covers([((0, 0), (2, 3)), ((2, 0), (1, 3))], (3, 3))            # True
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

MAX_CUT = 4
"""Dimensions along which a tensor may be cut into pieces."""

Shape = tuple[int, ...]


def covers(boxes: Sequence[tuple[Shape, Shape]], shape: Shape) -> bool:
    """Return whether boxes, (offset, shape) each, cover a shape and do not overlap.

    They must lie inside it. :class:`ValueError` if it is cut along more than :data:`MAX_CUT`
    dimensions.
    """
    if math.prod(shape) == 0:
        return True
    cut = [axis for axis, count in enumerate(shape) if any(box[axis] != count for _, box in boxes)]
    if len(cut) > MAX_CUT:
        raise ValueError(f"a tensor is cut along more than {MAX_CUT} dimensions")
    corners: Counter[Shape] = Counter()
    whole = ((0,) * len(shape), shape)
    for (offset, box), weight in [(whole, -1), *((one, 1) for one in boxes)]:
        for ends in product((0, 1), repeat=len(cut)):
            corner = tuple(
                offset[axis] + end * box[axis] for axis, end in zip(cut, ends, strict=True)
            )
            corners[corner] += -weight if sum(ends) % 2 else weight
    return not any(corners.values())
