"""Where the bytes of a checkpoint's tensors come from.

Example::

    for source in sources(catalog, checkpoint):
        print(source.tensor, source.how, source.stored_bytes)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msft_store import codecs
from msft_store.catalog import Catalog
from msft_store.format import BaseSpan
from msft_store.manifest import Checkpoint, chunk_sizes

IN_BASE = "equal to base"
MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class TensorSources:
    """One tensor of a checkpoint and how its chunks are kept."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    logical_bytes: int
    stored_bytes: int
    how: tuple[str, ...]
    """Distinct ways, the one with the most logical bytes first."""


def sources(catalog: Catalog, checkpoint: Checkpoint) -> Iterator[TensorSources]:
    """Yield the tensors of a checkpoint by name."""
    for name, entry in catalog.tensors(checkpoint).items():
        ways: dict[str, int] = {}
        stored_bytes = 0
        for piece in entry.pieces:
            for key, size in zip(piece.keys, chunk_sizes(piece, entry.dtype), strict=True):
                how, length = _how(catalog, key, checkpoint.base)
                ways[how] = ways.get(how, 0) + size
                stored_bytes += length
        yield TensorSources(
            tensor=name,
            dtype=entry.dtype.name,
            shape=entry.shape,
            logical_bytes=entry.nbytes,
            stored_bytes=stored_bytes,
            how=tuple(sorted(ways, key=lambda way: (-ways[way], way))),
        )


def _how(catalog: Catalog, key: bytes, base: str | None) -> tuple[str, int]:
    if catalog.objects.in_base(key, base) is not None:
        return IN_BASE, 0
    stored = catalog.objects.find(key, base)
    if stored is None:
        return MISSING, 0
    record = stored.record
    codec = codecs.by_code(record.codec)
    if not codec.needs_reference:
        return f"{codec.name}, no reference", record.length
    against = "base" if isinstance(record.reference, BaseSpan) else "checkpoint"
    return f"{codec.name} against {against}", record.length
