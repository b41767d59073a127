"""Save safetensors files as a checkpoint, in bounded memory.

Invariants: files are read at positions. At most :data:`GROUP_BYTES`, or one tensor, are in memory
at a time. The checkpoint exists only after all of its tensors were encoded.

Example::

    ckpt = import_checkpoint(store, "my-model", parent=base, step=100)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from msft_store._util import PathLike, check_path
from msft_store.errors import BaseError
from msft_store.objects.bases import Base
from msft_store.objects.counterparts import match_names
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.safetensors_header import TensorPlace, read_headers
from msft_store.storage.backend import read_file_into
from msft_store.store import Store
from msft_store.tensors.boxes import Box, Parts, whole_box
from msft_store.tensors.bytes import torch_dtype, view_bytes

GROUP_BYTES = 1 << 30


def import_checkpoint(
    store: Store,
    path: PathLike,
    *,
    parent: Base | Checkpoint | str | None = None,
    **metadata: Any,
) -> Checkpoint:
    """Save a safetensors file, or a directory of them, as a checkpoint.

    The keywords are those of :meth:`Store.save`. :class:`BaseError` if there are no valid files.
    """
    with store.awaiting_parts():
        parts = [store.encode(group, parent=parent) for group in _groups(check_path(path))]
        return store.save(Parts(parts), parent=parent, **metadata)


def find_matching_base(store: Store, path: PathLike) -> Base | None:
    """Return the store's only base if it is the same model as some safetensors files.

    It is the same model if one side has all tensors of the other by name and shape, or if some
    names agree and all tensors together have as many elements, as those of a model in memory and in
    files do. A prefix such as ``model.`` may differ. Returns ``None`` otherwise, or if the store
    has several bases.
    """
    bases = store.bases()
    if len(bases) != 1:
        return None
    theirs = bases[0].shapes
    headers = read_headers(check_path(path))
    shapes = {name: place.shape for _, header in headers for name, place in header.items()}
    found = match_names(shapes, theirs, exchanged=True)
    here, there = (sum(map(math.prod, side.values())) for side in (shapes, theirs))
    same = found.keys() == shapes.keys() or set(found.values()) == theirs.keys() or here == there
    return bases[0] if found and same else None


def _groups(path: Path) -> Iterator[list[Box]]:
    """Yield the tensors of the files in groups of at most ``GROUP_BYTES``."""
    group: list[Box] = []
    size = 0
    for file, header in read_headers(path):
        for name, place in header.items():
            if group and size + place.nbytes > GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(whole_box(name, _read(file, place)))
            size += place.nbytes
    yield group


def _read(file: Path, place: TensorPlace) -> torch.Tensor:
    tensor = torch.empty(place.shape, dtype=torch_dtype(place.dtype))
    if place.nbytes and read_file_into(file, place.offset, view_bytes(tensor).data) != place.nbytes:
        raise BaseError(f"{file} is shorter than its header says")
    return tensor
