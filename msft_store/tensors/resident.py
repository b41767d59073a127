"""Keep reference weights on the device, so that changes are found and compacted there.

A resident is a second copy of the weights on their device. It sends only the changes to the host:
at most seven bytes for a changed weight and a few for each run and gap. The weights still cross to
the host once a save, because the host computes their keys and verifies the encoded chunks.
Invariant: a chunk uses a resident's changes only if the key of its reference is equal, so that an
outdated resident, or one of another model, costs time but never gives wrong data.

Example::

    resident = Resident(model)                        # a model with the weights of the base
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
    """The changes of one chunk against a reference, whose key it has."""

    reference: bytes
    found: ChunkChanges


Compared = Mapping[tuple[str, int], Change]
"""Changes by tensor name and chunk number; chunks that are equal or unmatched are absent."""


def check_compared(compared: object) -> Compared | None:
    """Return a result of :meth:`Resident.compare`, or ``None``, if it is one."""
    if compared is None:
        return None
    if isinstance(compared, Mapping) and all(isinstance(c, Change) for c in compared.values()):
        return compared
    raise InvalidInputError(
        f"compared is what Resident.compare returns, not {str(compared)[:80]!r}"
    )


@dataclass(frozen=True, kw_only=True)
class _Copy:
    lanes: torch.Tensor
    """Flat copy on the device, as integers of the elements' size."""
    keys: tuple[bytes, ...]
    layout: FloatLayout


class Resident:
    """A copy of tensors on their device, to compare later values of them with.

    Args:
        tensors: Tensors by name, or a module. Only dense floats of 2 and 4 bytes are copied.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | torch.nn.Module) -> None:
        copies: dict[tuple[object, ...], _Copy | None] = {}
        self._copies: dict[str, _Copy] = {}
        for name, tensor in check_tensors(tensors).items():
            place = memory_key(tensor)
            if place not in copies:
                copies[place] = _copy(tensor)
            copy = copies[place]
            if copy is not None:
                self._copies[name] = copy

    def compare(self, tensors: Mapping[str, torch.Tensor] | torch.nn.Module) -> Compared:
        """Find the changes of tensors since the copy was made, on the device of the copy.

        Returns:
            Changes by tensor name and chunk number, for :meth:`Store.save`. Tensors of another
            name, shape or device than the copy's have none.
        """
        state = check_tensors(tensors)
        compared: dict[tuple[str, int], Change] = {}
        places: dict[tuple[object, ...], str] = {}
        for name, tensor in state.items():
            first = places.setdefault(memory_key(tensor), name)
            if first != name:
                again = {at: change for (of, at), change in compared.items() if of == first}
                compared |= {(name, at): change for at, change in again.items()}
            elif name in self._copies:
                found = _find_changes(tensor, self._copies[name])
                compared |= {(name, at): change for at, change in found}
        return compared


def _copy(tensor: torch.Tensor) -> _Copy | None:
    dtype = dtype_by_torch(tensor.dtype)
    layout = changes.float_layout(dtype)
    if layout is None or tensor.numel() == 0:
        return None
    step, count = CHUNK_BYTES // dtype.size, tensor.numel()
    keys = tuple(
        chunk_key(read_elements(tensor, at, min(at + step, count)).data, dtype)
        for at in range(0, count, step)
    )
    return _Copy(lanes=_lanes(tensor).clone(), keys=keys, layout=layout)


def _find_changes(tensor: torch.Tensor, copy: _Copy) -> Iterator[tuple[int, Change]]:
    lanes = _lanes(tensor) if dtype_by_torch(tensor.dtype).lane == copy.lanes.itemsize else None
    if lanes is None or lanes.shape != copy.lanes.shape or lanes.device != copy.lanes.device:
        return
    step = CHUNK_BYTES // lanes.itemsize
    for number, key in enumerate(copy.keys):
        part = slice(number * step, (number + 1) * step)
        new, old = lanes[part], copy.lanes[part]
        if not torch.equal(new, old):
            yield number, Change(reference=key, found=changes.find_changes(new, old, copy.layout))


def _lanes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(_LANES[dtype_by_torch(tensor.dtype).lane])
