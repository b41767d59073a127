"""What differs between two checkpoints, or a checkpoint and a base, tensor by tensor.

By bits: -0.0 and 0.0 differ, a NaN equals itself. Parts with equal keys are equal and are not read;
of the others a few are in memory at a time, unless the two are cut into other pieces.

Example::

    for tensor in diff(catalog, "3fa9", "best"):
        print(tensor.name, tensor.changed / tensor.elements, tensor.largest)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from msft_store.bases import Base
from msft_store.catalog import Catalog
from msft_store.decoding import decode_state, empty_like, named
from msft_store.dtypes import DType
from msft_store.kernels import Bytes
from msft_store.manifest import Checkpoint, Piece, TensorEntry, chunk_sizes
from msft_store.objects import Objects
from msft_store.parallel import in_order
from msft_store.sources import sources
from msft_store.tensors import torch_dtype, view_bytes

Kind = Literal["equal", "changed", "other", "added", "removed"]


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """One tensor of two checkpoints."""

    name: str
    kind: Kind
    """``other``: of another shape or dtype; ``added``, ``removed``: only the second, the first has
    it."""
    dtype: str
    shape: tuple[int, ...]
    """As the second one has it, or the first, if that alone does."""
    elements: int
    changed: int
    """Elements whose bits differ; all of them where there is nothing to compare."""
    largest: float | None
    """The largest absolute difference among values that are finite; ``None`` without any."""
    stored_bytes: int
    """Encoded bytes of the second one's chunks."""

    @property
    def share(self) -> float:
        """Return the share of elements that changed."""
        return self.changed / self.elements if self.elements else 0.0


@dataclass(frozen=True, kw_only=True)
class _Side:
    tensors: Mapping[str, TensorEntry]
    base: str | None
    what: str


def diff(catalog: Catalog, one: Base | Checkpoint, other: Base | Checkpoint) -> list[TensorDiff]:
    """Return all tensors of both, by name."""
    first, second = _side(catalog, one), _side(catalog, other)
    stored = {}
    if isinstance(other, Checkpoint):
        stored = {source.tensor: source.stored_bytes for source in sources(catalog, other)}
    return [
        _compare(catalog.objects, name, first, second, stored.get(name, 0))
        for name in sorted(first.tensors.keys() | second.tensors.keys())
    ]


def table_of(base: Base) -> dict[str, TensorEntry]:
    """Return a base's tensors as those of a checkpoint, each of one piece."""
    return {
        name: TensorEntry(
            dtype=tensor.dtype,
            shape=tensor.shape,
            pieces=(Piece(offset=(0,) * len(tensor.shape), shape=tensor.shape, keys=tensor.keys),),
        )
        for name, tensor in base.tensors.items()
    }


def _side(catalog: Catalog, one: Base | Checkpoint) -> _Side:
    if isinstance(one, Base):
        return _Side(tensors=table_of(one), base=one.id, what=f"base {one.id[:12]}")
    tensors = catalog.tensors(one)
    return _Side(tensors=tensors, base=one.base, what=f"checkpoint {one.id[:12]}")


def _compare(
    objects: Objects, name: str, first: _Side, second: _Side, stored_bytes: int
) -> TensorDiff:
    old, new = first.tensors.get(name), second.tensors.get(name)
    entry = new or old
    if entry is None:
        raise KeyError(name)
    elements = math.prod(entry.shape)
    kind: Kind = "removed" if new is None else "added"
    changed, largest = elements, None
    if old is not None and new is not None:
        kind = "other"
        if (old.dtype, old.shape) == (new.dtype, new.shape):
            changed, largest = _changes(objects, name, first, second)
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


def _changes(objects: Objects, name: str, first: _Side, second: _Side) -> tuple[int, float | None]:
    old, new = first.tensors[name], second.tensors[name]
    if [(p.offset, p.shape) for p in old.pieces] != [(p.offset, p.shape) for p in new.pieces]:
        whole = [_whole(objects, name, side) for side in (first, second)]
        return _count(view_bytes(whole[0]), view_bytes(whole[1]), new.dtype)
    changed, largest = 0, None
    jobs = _pairs(objects, name, first, second)
    with closing(in_order(lambda job: job(), jobs)) as counts:
        for count, most in counts:
            changed += count
            if most is not None:
                largest = most if largest is None else max(largest, most)
    return changed, largest


def _pairs(
    objects: Objects, name: str, first: _Side, second: _Side
) -> Iterator[Callable[[], tuple[int, float | None]]]:
    old, new = first.tensors[name], second.tensors[name]
    for before, after in zip(old.pieces, new.pieces, strict=True):
        sizes = chunk_sizes(after, new.dtype)
        for key, other, size in zip(before.keys, after.keys, sizes, strict=True):
            if key != other:
                reads = [
                    partial(_read, objects, name, side, key, size)
                    for side, key in ((first, key), (second, other))
                ]
                yield partial(_count_of, reads, new.dtype)


def _read(objects: Objects, name: str, side: _Side, key: bytes, size: int) -> Bytes:
    with named(f"{side.what}, tensor {name!r}"):
        return objects.read(key, size, side.tensors[name].dtype, side.base)


def _whole(objects: Objects, name: str, side: _Side) -> torch.Tensor:
    out = empty_like(side.tensors[name])
    decode_state(objects, {name: side.tensors[name]}, {name: out}, base=side.base, what=side.what)
    return out


def _count_of(reads: Sequence[Callable[[], Bytes]], dtype: DType) -> tuple[int, float | None]:
    one, other = (read() for read in reads)
    return _count(one, other, dtype)


def _count(one: Bytes, other: Bytes, dtype: DType) -> tuple[int, float | None]:
    """Return how many elements differ, and by how much at most."""
    differ = (one != other).reshape(-1, dtype.size).any(axis=1)
    changed = int(differ.sum())
    if not changed:
        return 0, None
    values = [
        torch.from_numpy(data.reshape(-1, dtype.size)[differ].reshape(-1)).view(torch_dtype(dtype))
        for data in (one, other)
    ]
    if values[0].is_complex():
        values = [torch.view_as_real(value.to(torch.complex64)) for value in values]
    distance = (values[1].double() - values[0].double()).abs()
    finite = distance[torch.isfinite(distance)]
    return changed, float(finite.max()) if len(finite) else None
