"""Find the counterparts in a base of the tensors that a save is given.

Invariant: at most a few thousand elements of a tensor are copied to the host, whatever device it is
on.

Example::

    mapping = map_to_base(objects.base(base.id), [whole_box(n, t) for n, t in state.items()])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.mapping import BaseMapping
from msft_store.objects.base_reader import BaseReader, can_convert
from msft_store.objects.counterparts import Side, find_mapping
from msft_store.tensors.boxes import Box


def map_to_base(reader: BaseReader, boxes: Sequence[Box]) -> BaseMapping:
    """Return the counterparts of tensors, of which this process holds ``boxes``, in a base."""
    held: dict[str, list[Box]] = {}
    for box in boxes:
        held.setdefault(box.name, []).append(box)

    def sample(name: str, index: NDArray[np.int64]) -> NDArray[np.float64]:
        found = np.full(len(index), np.nan)
        for box in held[name]:
            if box.tensor.is_complex():
                continue
            places = np.stack(np.unravel_index(index, box.shape or (1,)), axis=1)
            tensor = box.tensor.detach() if box.shape else box.tensor.detach().reshape(1)
            places -= np.array(box.offset or (0,))
            inside = ((places >= 0) & (places < np.array(tensor.shape))).all(axis=1)
            at = tuple(torch.from_numpy(axis.copy()) for axis in places[inside].T)
            found[inside] = tensor[tuple(axis.to(tensor.device) for axis in at)].cpu().double()
        return found

    tensors = reader.base.tensors
    return find_mapping(
        Side(
            shapes={name: found[0].shape for name, found in held.items()},
            dtypes={name: dtype_by_torch(found[0].tensor.dtype) for name, found in held.items()},
            sample=sample,
            boxes={
                name: [(box.offset, tuple(box.tensor.shape)) for box in found]
                for name, found in held.items()
            },
        ),
        Side(
            shapes={name: tensor.shape for name, tensor in tensors.items()},
            dtypes={name: tensor.dtype for name, tensor in tensors.items()},
            sample=reader.sample,
        ),
        can_convert,
    )
