"""References that stay on the device of the weights, so that changes are found and compacted there.

A resident is one more copy of the weights on their device. What crosses to the host because of it
is what changed, at most seven bytes a listed weight and a few for each run and gap; the weights
themselves cross all the same, once a save: their keys are taken, and what was encoded is verified,
on the host. Which chunks have which resident as reference is told by their keys: one that is out
of date, or of another model, costs time and is never wrong.

Example::

    resident = Resident(model)                        # as it was loaded from the base
    train(model)
    store.save(model, parent=base, compared=resident.compare(model))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from msft_store.codec import changes
from msft_store.codec.changes import ChunkChanges, FloatLayout
from msft_store.errors import InvalidInputError
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES, chunk_key
from msft_store.tensors.bytes import check_tensors, memory_key, read_elements

_LANES = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What changed in one chunk."""

    reference: bytes
    """Key of the chunk that it was compared with."""
    found: ChunkChanges


Compared = Mapping[tuple[str, int], Change]
"""By name of the tensor and number of the chunk; what is equal, or like nothing here, is absent."""


def check_compared(compared: object) -> Compared | None:
    """Return what a resident found, or ``None``; :class:`InvalidInputError` for anything else."""
    if compared is None:
        return None
    if isinstance(compared, Mapping) and all(isinstance(c, Change) for c in compared.values()):
        return compared
    raise InvalidInputError(
        f"compared is what Resident.compare returns, not {str(compared)[:80]!r}"
    )


@dataclass(frozen=True, kw_only=True)
class _Kept:
    lanes: torch.Tensor
    """Flat, on the device."""
    keys: tuple[bytes, ...]
    layout: FloatLayout


class Resident:
    """A copy of tensors on their device, to compare later ones with."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | torch.nn.Module) -> None:
        """Copy what may serve as a reference: dense floats of 2 and 4 bytes."""
        kept: dict[tuple[object, ...], _Kept | None] = {}
        self._kept: dict[str, _Kept] = {}
        for name, tensor in check_tensors(tensors).items():
            place = memory_key(tensor)
            if place not in kept:
                kept[place] = _keep(tensor)
            found = kept[place]
            if found is not None:
                self._kept[name] = found

    def compare(self, tensors: Mapping[str, torch.Tensor] | torch.nn.Module) -> Compared:
        """Return what changed, found on the device of the copy; for ``save(compared=…)``."""
        state = check_tensors(tensors)
        compared: dict[tuple[str, int], Change] = {}
        places: dict[tuple[object, ...], str] = {}
        for name, tensor in state.items():
            first = places.setdefault(memory_key(tensor), name)
            if first != name:
                again = {at: change for (of, at), change in compared.items() if of == first}
                compared |= {(name, at): change for at, change in again.items()}
            elif name in self._kept:
                found = _changes(tensor, self._kept[name])
                compared |= {(name, at): change for at, change in found}
        return compared


def _keep(tensor: torch.Tensor) -> _Kept | None:
    dtype = dtype_by_torch(tensor.dtype)
    layout = changes.float_layout(dtype)
    if layout is None or tensor.numel() == 0:
        return None
    step, count = CHUNK_BYTES // dtype.size, tensor.numel()
    keys = tuple(
        chunk_key(read_elements(tensor, at, min(at + step, count)).data, dtype)
        for at in range(0, count, step)
    )
    return _Kept(lanes=_lanes(tensor).clone(), keys=keys, layout=layout)


def _changes(tensor: torch.Tensor, kept: _Kept) -> Iterator[tuple[int, Change]]:
    lanes = _lanes(tensor) if dtype_by_torch(tensor.dtype).lane == kept.lanes.itemsize else None
    if lanes is None or lanes.shape != kept.lanes.shape or lanes.device != kept.lanes.device:
        return
    step = CHUNK_BYTES // lanes.itemsize
    for number, key in enumerate(kept.keys):
        part = slice(number * step, (number + 1) * step)
        new, old = lanes[part], kept.lanes[part]
        if not torch.equal(new, old):
            yield number, Change(reference=key, found=changes.find_changes(new, old, kept.layout))


def _lanes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(_LANES[dtype_by_torch(tensor.dtype).lane])
