"""The byte planes of rotated lanes, compiled by Numba.

Example::

    planes = split_rotated_planes(values, 2)
    join_rotated_planes(planes, values, 2)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint64

from msft_store.codec.numba_setup import compile_loop


@compile_loop
def split_rotated_planes(values: Any, width: Any) -> Any:
    """See :func:`msft_store.codec.kernels.split_rotated_planes`."""
    planes = np.empty(width * values.size, np.uint8)
    last = uint64(8 * width - 1)
    for number in range(width):
        plane, shift = planes[number * values.size : (number + 1) * values.size], uint64(8 * number)
        for i in range(values.size):
            value = uint64(values[i])
            plane[i] = ((value << uint64(1)) | (value >> last)) >> shift
    return planes


@compile_loop
def join_rotated_planes(planes: Any, values: Any, width: Any) -> None:
    """See :func:`msft_store.codec.kernels.join_rotated_planes`."""
    count = values.size
    last = uint64(8 * width - 1)
    if width == 2:
        low, high = planes[:count], planes[count:]
        for i in range(count):
            rotated = uint64(high[i]) << uint64(8) | uint64(low[i])
            values[i] = rotated >> uint64(1) | rotated << last
    else:
        a, b = planes[:count], planes[count : 2 * count]
        c, d = planes[2 * count : 3 * count], planes[3 * count :]
        for i in range(count):
            rotated = uint64(d[i]) << uint64(24) | uint64(c[i]) << uint64(16)
            rotated |= uint64(b[i]) << uint64(8) | uint64(a[i])
            values[i] = rotated >> uint64(1) | rotated << last
