"""Counting what a store holds.

Example::

    stats(catalog).on_disk_bytes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from msft_store.backend import QUARANTINE, disk_bytes, sizes
from msft_store.catalog import Catalog
from msft_store.keytable import among, concatenate, counted, unique
from msft_store.liveness import closure
from msft_store.manifest import Checkpoint


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
    quarantine_bytes: int
    """Of those, what repairs have set aside."""
    base_bytes: int
    """Of the bases that it refers to."""
    chunks: int
    """Distinct chunks that checkpoints name."""
    shared_chunks: int
    """Those that more than one checkpoint names, or that stand in a base."""


def held_bytes(catalog: Catalog) -> int:
    """Return the encoded bytes that no checkpoint names but that others are changes of."""
    catalog.refresh()
    index = catalog.objects.index
    needs = closure(catalog.objects, index, catalog.keys_by_base(catalog.checkpoints()))
    return int(index.lengths[needs.held].sum())


def encoded_bytes(catalog: Catalog, checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
    """Return the encoded bytes of the chunks that checkpoints name, by id; of those that exist."""
    catalog.refresh()
    there = [checkpoint for checkpoint in checkpoints if catalog.get(checkpoint.id) is not None]
    return {checkpoint.id: catalog.stored_bytes(checkpoint) for checkpoint in there}


def own_bytes(catalog: Catalog, checkpoint: Checkpoint) -> int:
    """Return the encoded bytes that nothing would need if it were not for a checkpoint."""
    index, known = catalog.objects.index, catalog.checkpoints()
    others = [other for other in known if other.id != checkpoint.id]
    needed, rest = (
        int(index.lengths[closure(catalog.objects, index, catalog.keys_by_base(some)).live].sum())
        for some in (known, others)
    )
    return needed - rest


def stats(catalog: Catalog) -> Stats:
    """Return what a store holds, counted now."""
    catalog.refresh()
    checkpoints, objects = catalog.checkpoints(), catalog.objects
    index, keys = objects.index, catalog.keys_by_base(checkpoints)
    needs = closure(objects, index, keys)
    uses = [unique(catalog.keys(checkpoint)) for checkpoint in checkpoints]
    named, times = counted(concatenate(uses))
    in_base = [some[objects.in_base_all(some, base)] for base, some in keys.items()]
    shared = (times > 1) | among(named, concatenate(in_base))
    return Stats(
        checkpoints=len(checkpoints),
        logical_bytes=sum(checkpoint.logical_bytes for checkpoint in checkpoints),
        stored_bytes=int(index.lengths.sum()),
        held_bytes=int(index.lengths[needs.held].sum()),
        on_disk_bytes=disk_bytes(catalog.backend),
        quarantine_bytes=sum(sizes(catalog.backend, QUARANTINE).values()),
        base_bytes=sum(base.logical_bytes for base in objects.bases().values()),
        chunks=len(named),
        shared_chunks=int(shared.sum()),
    )
