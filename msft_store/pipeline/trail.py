"""Go from one checkpoint in memory to another one by what differs.

A trail remembers by which differences the content of each chunk's memory came about, and how to
undo them. So the memory goes back to the nearest chunk that both checkpoints descend from, and
forward from there; a chain of differences from the base is read once.

Invariants: what a trail remembers is a guess. Each chunk is hashed after every switch, the
unchanged ones too, and one that is not right is read as without a trail. So nobody who wrote to the
memory in between can make a result wrong. The ways back take at most twice the bytes of the
memory; the oldest ones are dropped first.

Example::

    trail = Trail()
    for checkpoint in checkpoints:
        decode_state(Source.of(catalog, checkpoint), table, outs, trail=trail)
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from msft_store.codec.kernels import Bytes
from msft_store.codec.undo import Undo
from msft_store.errors import StoreError
from msft_store.format.dtypes import DType
from msft_store.format.layout import chunk_key
from msft_store.objects.chunks import ChunkStore

_MOST = 2
"""Bytes of the ways back for each byte of memory. One of many changes takes the chunk again."""


@dataclass
class _Level:
    """A chunk, and the way back to the level below."""

    key: bytes
    undo: Undo | None
    """``None`` at the lowest level."""


@dataclass
class Trail:
    """How the content of a target's chunks came about.

    Threads share it, but no two work at one chunk.
    """

    _levels: dict[Hashable, list[_Level]] = field(default_factory=dict)
    """By place; the last level of each is what its memory should hold."""

    def reach(
        self,
        place: Hashable,
        out: Bytes,
        key: bytes,
        *,
        dtype: DType,
        objects: ChunkStore,
        base: str | None,
    ) -> bool:
        """Let the memory of a place hold a chunk; return False if that takes a read of all.

        ``out`` is the memory. After False it is undefined.
        """
        levels = self._levels.pop(place, [])
        try:
            self._go(levels, out, key, dtype=dtype, objects=objects, base=base)
        except (StoreError, ValueError, IndexError):
            # The levels are not of this memory, or the store is damaged or changing.
            return False
        if chunk_key(out.data, dtype) != key:
            return False
        _limit(levels, _MOST * out.size)
        self._levels[place] = levels
        return True

    def _go(
        self,
        levels: list[_Level],
        out: Bytes,
        key: bytes,
        *,
        dtype: DType,
        objects: ChunkStore,
        base: str | None,
    ) -> None:
        start, steps = objects.find_steps(key, base, {level.key for level in levels})
        while levels and levels[-1].key != start:
            undo = levels.pop().undo
            if undo is not None:
                undo.apply(out)
        if not levels:
            if steps:
                objects.fill_reference(steps[0], out)
            else:
                objects.read_into(out, key, dtype, base)
            levels.append(_Level(start, None))
        for step in steps:
            levels.append(_Level(step.record.key, objects.apply(step, out, dtype)))


def _limit(levels: list[_Level], most: int) -> None:
    """Drop the oldest ways back if all take more than ``most`` bytes."""
    while sum(level.undo.nbytes for level in levels if level.undo is not None) > most:
        levels.pop(0)
        levels[0].undo = None
