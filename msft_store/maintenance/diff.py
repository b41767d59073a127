"""Compare two checkpoints, or a checkpoint and a base, tensor by tensor.

Invariant: bits are compared: -0.0 and 0.0 differ but a NaN equals itself. Chunks with equal keys
are equal and are not read; only a few of the others are in memory at a time. A tensor that the two
sides split into different pieces is read completely, some rows at a time.

Example::

    for tensor in diff(catalog, "3fa9", "best"):
        print(tensor.name, tensor.changed / tensor.elements, tensor.largest)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from msft_store.codec.kernels import Bytes
from msft_store.format.dtypes import DType
from msft_store.maintenance.stats import sources
from msft_store.objects.bases import Base
from msft_store.objects.catalog import Catalog
from msft_store.objects.counterparts import match_names
from msft_store.objects.manifest import Checkpoint, TensorEntry, whole_entry
from msft_store.pipeline.decode import Source
from msft_store.pipeline.parallel import in_order
from msft_store.pipeline.reshard import decode_boxes
from msft_store.tensors.boxes import Box
from msft_store.tensors.bytes import torch_dtype, view_bytes
from msft_store.tensors.files import split_files

Kind = Literal["equal", "changed", "other", "added", "removed"]

SLAB_BYTES = 64 << 20
"""Bytes of each side in memory at once, for a tensor that the sides split differently."""
_FLOATS_WITHOUT_SIGN = ("float8_e8m0fnu",)
"""Dtypes whose bits are not sign and magnitude, but whose values are floats."""


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """Compare one tensor of two checkpoints.

    Attributes:
        name: Name of the tensor.
        kind: ``equal``; ``changed``; ``other`` if the shape or dtype differs; ``added`` if only the
            second checkpoint has the tensor; ``removed`` if only the first one has it.
        dtype: Dtype in the second checkpoint, or in the first one if the tensor was removed.
        shape: Shape in the same checkpoint as ``dtype``.
        elements: Number of elements of that shape.
        changed: Number of elements whose bits differ; all of them if there is nothing to compare.
        largest: Largest finite absolute difference; ``None`` if there is none. For integers it is
            rounded to a float, for complex numbers it is the modulus of the difference.
        stored_bytes: Encoded bytes of the tensor's chunks in the second checkpoint.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    elements: int
    changed: int
    largest: float | None
    stored_bytes: int

    @property
    def share(self) -> float:
        """Share of the elements that changed, from 0 to 1."""
        return self.changed / self.elements if self.elements else 0.0


@dataclass(frozen=True, kw_only=True)
class _Side:
    tensors: Mapping[str, TensorEntry]
    source: Source
    names: Mapping[str, str] = field(default_factory=dict)
    """Names in the checkpoint that differ from the base → names in the base."""


def diff(catalog: Catalog, one: Base | Checkpoint, other: Base | Checkpoint) -> list[TensorDiff]:
    """Compare all tensors of both sides, in the order of their names.

    If one side is a base, the tensors of the checkpoint get the names of the matching tensors of
    the base, without their prefix.
    """
    first, second = _side(catalog, one, other), _side(catalog, other, one)
    stored = {}
    if isinstance(other, Checkpoint):
        stored = {
            second.names.get(source.tensor, source.tensor): source.stored_bytes
            for source in sources(catalog, other)
        }
    return [
        _compare(name, first, second, stored.get(name, 0))
        for name in sorted(first.tensors.keys() | second.tensors.keys())
    ]


def table_of(base: Base) -> dict[str, TensorEntry]:
    """Return the tensors of a base as entries of one piece each, as in a checkpoint."""
    return {name: whole_entry(t.dtype, t.shape, t.keys) for name, t in base.tensors.items()}


def _side(catalog: Catalog, one: Base | Checkpoint, other: Base | Checkpoint) -> _Side:
    """Return one side; a checkpoint beside a base gets the names of that base."""
    if isinstance(one, Base):
        source = Source(objects=catalog.objects, base=one.id, name=f"base {one.id[:12]}")
        return _Side(tensors=table_of(one), source=source)
    tensors, source = split_files(catalog.tensors(one))[0], Source.of(catalog, one)
    if not isinstance(other, Base):
        return _Side(tensors=tensors, source=source)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    found = match_names(shapes, other.shapes)
    if one.base == other.id:
        known = catalog.tables.mapping(one).names
        found |= {name: old for name, old in known.items() if name in shapes}
    names: dict[str, str] = {}
    taken = set(tensors)
    for name, theirs in found.items():
        if theirs not in taken:
            names[name] = theirs
            taken.add(theirs)
    tensors = {names.get(name, name): entry for name, entry in tensors.items()}
    return _Side(tensors=tensors, source=source, names=names)


def _compare(name: str, first: _Side, second: _Side, stored_bytes: int) -> TensorDiff:
    old, new = first.tensors.get(name), second.tensors.get(name)
    entry = new or first.tensors[name]
    elements = math.prod(entry.shape)
    kind: Kind = "removed" if new is None else "added"
    changed, largest = elements, None
    if old is not None and new is not None:
        kind = "other"
        if (old.dtype, old.shape) == (new.dtype, new.shape):
            changed, largest = _changes(name, first, second)
            kind = "changed" if changed else "equal"
    return TensorDiff(
        name=name,
        kind=kind,
        dtype=entry.dtype.name,
        shape=entry.shape,
        elements=elements,
        changed=changed,
        largest=largest,
        stored_bytes=stored_bytes,
    )


def _changes(name: str, first: _Side, second: _Side) -> tuple[int, float | None]:
    old, new = first.tensors[name], second.tensors[name]
    if [(p.offset, p.shape) for p in old.pieces] != [(p.offset, p.shape) for p in new.pieces]:
        return _total(_compare_slabs(name, first, second))

    def compare(chunk: tuple[bytes, bytes, int]) -> tuple[int, float | None]:
        before, after, size = chunk
        one = first.source.read(name, before, size, old.dtype)
        return _count(one, second.source.read(name, after, size, new.dtype), new.dtype)

    pairs = zip(old.chunks(), new.chunks(), strict=True)
    chunks = ((before, after, size) for (before, size), (after, _) in pairs if before != after)
    with closing(in_order(compare, chunks)) as counts:
        return _total(counts)


def _total(counts: Iterable[tuple[int, float | None]]) -> tuple[int, float | None]:
    changed, largest = 0, None
    for count, most in counts:
        changed += count
        if most is not None:
            largest = most if largest is None else max(largest, most)
    return changed, largest


def _compare_slabs(name: str, first: _Side, second: _Side) -> Iterator[tuple[int, float | None]]:
    """Compare a tensor whose pieces differ, some rows at a time."""
    entry = second.tensors[name]
    row = math.prod(entry.shape[1:]) * entry.dtype.size
    step = max(1, SLAB_BYTES // max(1, row))
    for start in range(0, entry.shape[0], step):
        rows = min(step, entry.shape[0] - start)
        one, other = (_read_rows(name, side, start, rows) for side in (first, second))
        yield _count(one, other, entry.dtype)


def _read_rows(name: str, side: _Side, start: int, rows: int) -> Bytes:
    entry = side.tensors[name]
    out = torch.empty((rows, *entry.shape[1:]), dtype=torch_dtype(entry.dtype))
    offset = (start, *(0 for _ in entry.shape[1:]))
    box = Box(name=name, shape=entry.shape, offset=offset, tensor=out)
    decode_boxes(side.source, {name: entry}, [box])
    return view_bytes(out)


def _count(one: Bytes, other: Bytes, dtype: DType) -> tuple[int, float | None]:
    """Return the number of different elements and the largest finite difference."""
    differ = (one != other).reshape(-1, dtype.size).any(axis=1)
    changed = int(differ.sum())
    if not changed:
        return 0, None
    parts = [data.reshape(-1, dtype.size)[differ].reshape(-1) for data in (one, other)]
    if not (dtype.floating or dtype.name in _FLOATS_WITHOUT_SIGN):
        return changed, _largest_integer_difference(parts[0], parts[1], dtype)
    values = [torch.from_numpy(part).view(torch_dtype(dtype)) for part in parts]
    if values[0].is_complex():
        # Torch cannot turn half of a complex32 into a complex128.
        small = dtype.size < torch.complex64.itemsize
        values = [(v.to(torch.complex64) if small else v).to(torch.complex128) for v in values]
    else:
        values = [value.double() for value in values]
    distance = (values[1] - values[0]).abs()
    finite = distance[torch.isfinite(distance)]
    return changed, float(finite.max()) if len(finite) else None


def _largest_integer_difference(one: Bytes, other: Bytes, dtype: DType) -> float:
    # A float cannot hold 64 bits, and a difference may overflow the integer type.
    kind = np.dtype(np.uint8 if dtype.name == "bool" else dtype.name)
    before, after = one.view(kind), other.view(kind)
    above = np.maximum(before, after).astype(np.uint64)
    return float((above - np.minimum(before, after).astype(np.uint64)).max())
