"""Encode the average of checkpoints chunk by chunk, in bounded memory.

Invariants: a chunk is read, averaged and encoded by one thread, and written in a fixed order. At
most a few chunks per thread and checkpoint are in memory. The exception is a tensor that was saved
in other pieces in one of the checkpoints: it is read whole, one such tensor at a time.

Example::

    table, totals = encode_average(objects, terms, begin, options=options, tables=[parent])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from msft_store.codec.kernels import Bytes
from msft_store.format.layout import CHUNK_BYTES
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import TensorEntry, whole_entry
from msft_store.objects.packs import PackWriter
from msft_store.objects.reference_planner import Table
from msft_store.pipeline.decode import Source, decode_state, empty_like
from msft_store.pipeline.encode import (
    Content,
    EncodeOptions,
    Totals,
    encode_contents,
    make_planner,
)
from msft_store.tensors.averages import average_bytes
from msft_store.tensors.bytes import view_bytes
from msft_store.tensors.files import PREFIX


@dataclass(frozen=True, kw_only=True)
class Term:
    """A checkpoint of an average."""

    source: Source
    tensors: Mapping[str, TensorEntry]
    weight: float


def encode_average(
    objects: ChunkStore,
    terms: Sequence[Term],
    begin: Callable[[], PackWriter],
    *,
    options: EncodeOptions,
    tables: Sequence[Table],
) -> tuple[dict[str, TensorEntry], Totals]:
    """Store the average of checkpoints with the same tensors; return its tensor table and sizes.

    Files are those of the last checkpoint. ``begin`` creates a pack; it is called only if there is
    a chunk to write.
    """
    table = terms[-1].tensors
    planner = make_planner(objects, options, tables)
    reader = _Reader(terms)
    # As in a save, tied tensors are encoded once, under a name that has references if one has.
    order = sorted(table, key=lambda name: (not planner.knows(name, table[name].shape), name))
    firsts: dict[tuple[TensorEntry, ...], str] = {}
    first = {name: firsts.setdefault(reader.entries(name), name) for name in order}
    contents = [content for name in firsts.values() for content in reader.contents(name)]
    found, totals = encode_contents(objects, contents, begin, options=options, planner=planner)
    done = {name: replace(table[name], pieces=()) for name in firsts.values()}
    for content, entry in zip(contents, found, strict=True):
        name = content.name
        done[name] = replace(done[name], pieces=(*done[name].pieces, *entry.pieces))
    return {name: done[first[name]] for name in table}, totals


class _Reader:
    """Reads the chunks of the average of checkpoints."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        self._weights = [term.weight for term in terms]
        self._lock = threading.Lock()
        self._whole: tuple[str, list[Bytes]] = ("", [])

    def _of(self, name: str) -> Sequence[Term]:
        return self._terms[-1:] if name.startswith(PREFIX) else self._terms

    def entries(self, name: str) -> tuple[TensorEntry, ...]:
        """Return a tensor's entry in each checkpoint that its average is of."""
        return tuple(term.tensors[name] for term in self._of(name))

    def contents(self, name: str) -> list[Content]:
        """Return the pieces of a tensor, or the whole tensor if the checkpoints' pieces differ."""
        *others, last = self.entries(name)
        layout = [(piece.offset, piece.shape) for piece in last.pieces]
        if any([(p.offset, p.shape) for p in other.pieces] != layout for other in others):
            entry = whole_entry(last.dtype, last.shape, ())

            def read_range(start: int, stop: int) -> Bytes:
                at = slice(start * last.dtype.size, stop * last.dtype.size)
                wholes = [data[at] for data in self._read_whole(name)]
                return average_bytes(wholes, self._weights, last.dtype)

            return [Content(name=name, entry=entry, read=read_range)]
        return [self._piece(name, number) for number in range(len(last.pieces))]

    def _piece(self, name: str, number: int) -> Content:
        terms, entries = self._of(name), self.entries(name)
        dtype, piece = entries[-1].dtype, entries[-1].pieces[number]

        def read_chunk(start: int, stop: int) -> Bytes:
            place, size = start * dtype.size // CHUNK_BYTES, (stop - start) * dtype.size
            keys = [entry.pieces[number].keys[place] for entry in entries]
            if len(set(keys)) == 1 or not dtype.floating:
                return terms[-1].source.read(name, keys[-1], size, dtype)
            pairs = zip(terms, keys, strict=True)
            parts = [term.source.read(name, key, size, dtype) for term, key in pairs]
            return average_bytes(parts, self._weights, dtype)

        entry = replace(entries[-1], pieces=(replace(piece, keys=()),))
        return Content(name=name, entry=entry, read=read_chunk)

    def _read_whole(self, name: str) -> list[Bytes]:
        with self._lock:
            if self._whole[0] != name:
                self._whole = ("", [])
                wholes = []
                for term in self._terms:
                    entry = term.tensors[name]
                    out = empty_like(entry, "cpu")
                    decode_state(term.source, {name: entry}, {name: out}, fresh=True)
                    wholes.append(view_bytes(out))
                self._whole = (name, wholes)
            return self._whole[1]
