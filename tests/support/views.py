"""Views of a base in plain numpy, and the sides of a search for counterparts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from msft_store.format.dtypes import dtype_by_name
from msft_store.format.mapping import BaseMapping, View
from msft_store.objects.counterparts import Side, find_mapping

Arrays = Mapping[str, NDArray[np.float32]]


def side(arrays: Arrays) -> Side:
    """Return the side of a search that holds arrays."""
    return Side(
        shapes={name: array.shape for name, array in arrays.items()},
        dtypes=dict.fromkeys(arrays, dtype_by_name("float32")),
        sample=lambda name, index: arrays[name].reshape(-1)[index].astype(np.float64),
    )


def find(tensors: Arrays, base: Arrays) -> BaseMapping:
    """Return the counterparts of arrays in others."""
    return find_mapping(side(tensors), side(base))


def shown(view: View, base: Arrays) -> NDArray[np.float32]:
    """Return the elements of a view."""
    out = np.zeros(view.shape, np.float32)
    for part in view.parts:
        array = base[part.tensor].reshape(part.view or base[part.tensor].shape)
        axes = part.axes or range(array.ndim)
        lead = max(array.ndim - len(part.shape), 0)
        sizes = [1] * max(array.ndim - len(part.shape), 0) + list(part.shape)[-array.ndim :]
        box = [slice(None)] * array.ndim
        for axis, size in zip(axes, sizes, strict=True):
            box[axis] = slice(part.start[axis], part.start[axis] + size)
        assert all(size == 1 for size in sizes[:lead])
        place = tuple(slice(at, at + n) for at, n in zip(part.offset, part.shape, strict=True))
        out[place] = array[tuple(box)].transpose(axes).reshape(part.shape)
    return out


def counterpart(name: str, mapping: BaseMapping, base: Arrays) -> NDArray[np.float32] | None:
    """Return the elements that a checkpoint's tensor is a change of, or ``None``."""
    if name in mapping.views:
        return shown(mapping.views[name], base)
    return base.get(mapping.names.get(name, name))
