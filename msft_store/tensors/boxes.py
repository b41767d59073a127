"""Describe checkpoints that several processes save together.

Each process holds boxes of tensors and encodes them into its own pack; the result is a
:class:`Part`. One process collects all parts, joins them into one tensor table and writes the
manifest. Invariant: in a joined table, the boxes of a tensor cover each element exactly once.

Example::

    part = store.encode([Box(name="w", shape=(8, 4), offset=(4, 0), tensor=shard)], parent=base)
    ckpt = store.save(Parts(parts), parent=base, step=10)       # in one process
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from msft_store.errors import InvalidInputError
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.mapping import NOTHING, BaseMapping
from msft_store.objects.manifest import Piece, TensorEntry, is_exactly_covered


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangular part of a tensor, or the whole tensor, that one process holds.

    Attributes:
        name: Name of the whole tensor.
        shape: Shape of the whole tensor.
        offset: Index of the box's first element in the whole tensor, for each dimension.
        tensor: Elements of the box; on any device, of any strided layout.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor

    def entry(self, keys: tuple[bytes, ...] = ()) -> TensorEntry:
        """Return the whole tensor with this box as its only piece, of chunks with these keys."""
        piece = Piece(offset=self.offset, shape=tuple(self.tensor.shape), keys=keys)
        return TensorEntry(
            dtype=dtype_by_torch(self.tensor.dtype), shape=self.shape, pieces=(piece,)
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """The share of one process in a checkpoint; it can be pickled and sent to another process.

    Attributes:
        base: Id of the base that it was encoded against, or ``None``.
        tensors: Tensors by name, each with the pieces that this process held.
        stored_bytes: Encoded bytes of their chunks.
        unreferenced_bytes: Decoded bytes that were encoded without a reference.
        mapping: Counterparts in the base of the boxes that this process held.
    """

    base: str | None
    tensors: Mapping[str, TensorEntry]
    stored_bytes: int
    unreferenced_bytes: int
    mapping: BaseMapping = NOTHING


@dataclass(frozen=True)
class Parts:
    """The parts of all processes, in any order, that together make one checkpoint."""

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable[Part]) -> None:
        object.__setattr__(self, "parts", tuple(parts))

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)


def whole_box(name: str, tensor: torch.Tensor) -> Box:
    """Return a box that holds a whole tensor."""
    shape = tuple(tensor.shape)
    return Box(name=name, shape=shape, offset=(0,) * len(shape), tensor=tensor)


def check_boxes(boxes: Iterable[Box]) -> list[Box]:
    """Return the boxes without the empty ones; a box of an empty tensor becomes the whole tensor.

    :class:`InvalidInputError` if a box lies outside its tensor.
    """
    found = []
    for box in boxes:
        inner = tuple(box.tensor.shape)
        sizes = zip(box.offset, inner, box.shape, strict=False)
        if not len(box.offset) == len(inner) == len(box.shape) or any(
            first < 0 or first + size > whole for first, size, whole in sizes
        ):
            raise InvalidInputError(
                f"a box of {box.name!r}, {inner} at {box.offset}, exceeds the shape {box.shape}"
            )
        if box.tensor.numel():
            found.append(box)
        elif math.prod(box.shape) == 0:
            found.append(whole_box(box.name, box.tensor.new_empty(box.shape)))
    return found


def join_parts(parts: Iterable[Part]) -> dict[str, TensorEntry]:
    """Join the tensors of all parts into one tensor table.

    :class:`InvalidInputError` names a tensor whose pieces overlap, leave elements out, or differ in
    dtype or shape.
    """
    table: dict[str, TensorEntry] = {}
    for part in parts:
        for name, entry in part.tensors.items():
            known = table.setdefault(name, replace(entry, pieces=()))
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise InvalidInputError(f"{name!r} has another dtype or shape in another process")
            pieces = (*known.pieces, *(p for p in entry.pieces if p not in known.pieces))
            table[name] = replace(known, pieces=pieces)
    for name, entry in table.items():
        pieces = tuple(sorted(entry.pieces, key=lambda piece: piece.offset))
        if not _cover_exactly(pieces, entry.shape):
            raise InvalidInputError(
                f"the pieces of {name!r} do not cover its shape {entry.shape}, or overlap: "
                "the processes together must pass each element exactly once"
            )
        table[name] = replace(entry, pieces=pieces)
    return table


def _cover_exactly(pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> bool:
    if math.prod(shape) == 0:
        return len(pieces) == 1
    try:
        return is_exactly_covered([(piece.offset, piece.shape) for piece in pieces], shape)
    except ValueError:
        return False
