"""Counting what a store holds.

Example::

    stats(catalog).on_disk_bytes
"""

from __future__ import annotations

from dataclasses import dataclass

from msft_store.backend import disk_bytes
from msft_store.catalog import Catalog
from msft_store.objects import Stored, closure


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a store holds, in bytes and counts."""

    checkpoints: int
    logical_bytes: int
    """Of all checkpoints, as if each were a full copy."""
    stored_bytes: int
    """Encoded bytes of all chunks in packs."""
    held_bytes: int
    """Those of chunks that no checkpoint names but that others are changes of."""
    on_disk_bytes: int
    """All files of the store, temporary ones included; bases are elsewhere."""
    base_bytes: int
    """Of the bases that it refers to."""
    chunks: int
    """Distinct chunks that checkpoints name."""
    shared_chunks: int
    """Those that more than one checkpoint names, or that stand in a base."""


def stats(catalog: Catalog) -> Stats:
    """Return what a store holds, counted now."""
    catalog.refresh()
    checkpoints, objects = catalog.checkpoints(), catalog.objects
    uses: dict[bytes, int] = {}
    live: set[Stored] = set()
    for checkpoint in checkpoints:
        live |= closure(objects, catalog.keys(checkpoint), checkpoint.base)[0]
        for key in catalog.keys(checkpoint):
            in_base = objects.in_base(key, checkpoint.base) is not None
            uses[key] = uses.get(key, 0) + (2 if in_base else 1)
    records = (record for pack in objects.packs.values() for record in pack)
    return Stats(
        checkpoints=len(checkpoints),
        logical_bytes=sum(checkpoint.logical_bytes for checkpoint in checkpoints),
        stored_bytes=sum(record.length for record in records),
        held_bytes=sum(s.record.length for s in live if s.record.key not in uses),
        on_disk_bytes=disk_bytes(catalog.backend),
        base_bytes=sum(base.logical_bytes for base in objects.bases().values()),
        chunks=len(uses),
        shared_chunks=sum(count > 1 for count in uses.values()),
    )
