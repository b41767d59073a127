"""Find the counterparts in a base of the tensors that a save is given.

Invariant: at most a few thousand elements of a tensor are copied to the host, whatever device it is
on.

Example::

    mapping = map_to_base(objects.base(base.id), [whole_box(n, t) for n, t in state.items()])
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.mapping import BaseMapping, Shape
from msft_store.objects.base_reader import BaseReader
from msft_store.objects.bases import Base
from msft_store.objects.counterparts import Side, find_mapping, match_names
from msft_store.objects.manifest import TensorEntry
from msft_store.tensors.boxes import Box

MOST_MISSING = 0.05
"""Largest share of bytes without a counterpart that needs no warning."""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Missing:
    """The tensors of a checkpoint without a counterpart in its base, in bytes by name."""

    tensors: Mapping[str, int]
    share: float
    """Their part of the checkpoint, or of the base if the base's rest is smaller."""

    def describe(self, base: Base) -> str:
        """Return a warning with the names and the remedy."""
        largest = sorted(self.tensors, key=lambda name: (-self.tensors[name], name))
        shown = ", ".join(map(repr, largest[:_SHOWN])) + (", …" if len(largest) > _SHOWN else "")
        return (
            f"{self.share:.0%} of the checkpoint, {len(largest)} tensors, have no counterpart in "
            f"base {base.id[:12]} ({base.path}) and are stored whole: {shown}. If the base holds "
            "the same model in another form, add a base in the form of the model in memory: "
            "model.save_pretrained(PATH, save_original_format=False), then msft-store add-base PATH"
        )


def find_missing(base: Base, mapping: BaseMapping, tensors: Mapping[str, TensorEntry]) -> Missing:
    """Return the tensors that have no counterpart, or none in part.

    What a checkpoint has besides the model, such as the state of an optimizer, does not count: the
    base then has no tensors left over.
    """
    missing: dict[str, int] = {}
    shown: Counter[str] = Counter()
    for name, entry in tensors.items():
        view, other = mapping.views.get(name), mapping.names.get(name, name)
        if view is not None:
            for part in view.parts:
                shown[part.tensor] += math.prod(part.shape)
            rest = math.prod(view.shape) - view.covered
        elif other in base.tensors and base.tensors[other].shape == entry.shape:
            shown[other] += math.prod(entry.shape)
            rest = 0
        else:
            rest = math.prod(entry.shape)
        if rest:
            missing[name] = rest * entry.dtype.size
    left = sum(
        max(math.prod(tensor.shape) - shown[name], 0) * tensor.dtype.size
        for name, tensor in base.tensors.items()
    )
    whole = sum(entry.nbytes for entry in tensors.values())
    here, there = sum(missing.values()) / max(whole, 1), left / max(base.logical_bytes, 1)
    return Missing(tensors=missing, share=min(here, there))


def map_by_names(base: Base, shapes: Mapping[str, Shape]) -> BaseMapping:
    """Return the counterparts of tensors in a base as far as their names tell."""
    names = match_names(shapes, base.shapes)
    return BaseMapping(names={new: old for new, old in names.items() if new != old}, views={})


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
            shapes=reader.base.shapes,
            dtypes={name: tensor.dtype for name, tensor in reader.base.tensors.items()},
            sample=reader.sample,
        ),
    )
