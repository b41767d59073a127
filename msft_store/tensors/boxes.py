"""Checkpoints that several processes write: boxes in, parts out, one table of all.

A box is what one process holds of a tensor. Each process encodes its boxes into a pack of its own,
which makes a :class:`Part`; one of them collects the parts and publishes the checkpoint, which
exists from then on. Invariant: a table is made only of boxes that cover each tensor and do not
overlap.

Example::

    part = store.encode([Box(name="w", shape=(8, 4), offset=(4, 0), tensor=mine)], parent=base)
    ckpt = store.save(Parts(gathered), parent=base, step=10)        # in one process
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from msft_store.errors import InvalidInputError
from msft_store.format.dtypes import dtype_by_torch
from msft_store.objects.manifest import Piece, TensorEntry, is_exactly_covered


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a tensor that one process holds, or a whole one."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the box begins, in each dimension."""
    tensor: torch.Tensor
    """The box itself; on any device, of any layout."""

    def entry(self, keys: tuple[bytes, ...] = ()) -> TensorEntry:
        """Return the tensor with this piece alone."""
        piece = Piece(offset=self.offset, shape=tuple(self.tensor.shape), keys=keys)
        return TensorEntry(
            dtype=dtype_by_torch(self.tensor.dtype), shape=self.shape, pieces=(piece,)
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process has encoded of a checkpoint to come; it can be sent to another one."""

    base: str | None
    """Id of the base that it was encoded against."""
    tensors: Mapping[str, TensorEntry]
    """Tensors with the pieces that this process had."""
    stored_bytes: int
    """Encoded bytes of their chunks."""
    unreferenced_bytes: int
    """Decoded bytes of what was encoded without a reference."""


@dataclass(frozen=True)
class Parts:
    """All parts of a checkpoint to come, of all processes."""

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable[Part]) -> None:
        object.__setattr__(self, "parts", tuple(parts))

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)


def whole_box(name: str, tensor: torch.Tensor) -> Box:
    """Return the box that is a whole tensor."""
    shape = tuple(tensor.shape)
    return Box(name=name, shape=shape, offset=(0,) * len(shape), tensor=tensor)


def check_boxes(boxes: Iterable[Box]) -> list[Box]:
    """Return the boxes with something in them; an empty tensor has one, which is all of it.

    :class:`InvalidInputError` for one that lies outside its tensor.
    """
    found = []
    for box in boxes:
        inner = tuple(box.tensor.shape)
        sizes = zip(box.offset, inner, box.shape, strict=False)
        if not len(box.offset) == len(inner) == len(box.shape) or any(
            first < 0 or first + size > whole for first, size, whole in sizes
        ):
            raise InvalidInputError(
                f"a box of {box.name!r}, {inner} at {box.offset}, is not inside of {box.shape}"
            )
        if box.tensor.numel():
            found.append(box)
        elif math.prod(box.shape) == 0:
            found.append(whole_box(box.name, box.tensor.new_empty(box.shape)))
    return found


def join_parts(parts: Iterable[Part]) -> dict[str, TensorEntry]:
    """Return the tensor table of a checkpoint of parts.

    :class:`InvalidInputError` names a tensor whose pieces do not fit, or leave something out.
    """
    table: dict[str, TensorEntry] = {}
    for part in parts:
        for name, entry in part.tensors.items():
            known = table.setdefault(
                name, TensorEntry(dtype=entry.dtype, shape=entry.shape, pieces=())
            )
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise InvalidInputError(f"{name!r} has another dtype or shape in another process")
            pieces = (*known.pieces, *(p for p in entry.pieces if p not in known.pieces))
            table[name] = TensorEntry(dtype=known.dtype, shape=known.shape, pieces=pieces)
    for name, entry in table.items():
        pieces = tuple(sorted(entry.pieces, key=lambda piece: piece.offset))
        if not _fit(pieces, entry.shape):
            raise InvalidInputError(
                f"the pieces of {name!r} do not cover its shape {entry.shape}, or overlap: "
                "every process must give what it holds, and each element once"
            )
        table[name] = TensorEntry(dtype=entry.dtype, shape=entry.shape, pieces=pieces)
    return table


def _fit(pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> bool:
    if math.prod(shape) == 0:
        return len(pieces) == 1
    try:
        return is_exactly_covered([(piece.offset, piece.shape) for piece in pieces], shape)
    except ValueError:
        return False
