"""Count the bytes of a store, and list how each tensor of a checkpoint is stored.

Example::

    print(stats(catalog).on_disk_bytes)
    for source in sources(catalog, checkpoint):
        print(source.tensor, source.how, source.stored_bytes)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from msft_store.codec import codecs
from msft_store.format.key_table import concatenate_keys, count_keys, is_among, unique_keys
from msft_store.format.layout import BaseSpan, ViewSpan
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import MANIFESTS, Checkpoint
from msft_store.objects.reachability import find_reachable
from msft_store.storage.backend import QUARANTINE, disk_bytes, file_sizes
from msft_store.tensors.files import split_files


@dataclass(frozen=True, kw_only=True)
class TensorSources:
    """One tensor of a checkpoint, and how its chunks are stored."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    logical_bytes: int
    stored_bytes: int
    how: tuple[str, ...]
    """Distinct representations, the one with the most logical bytes first."""


def sources(catalog: Catalog, checkpoint: Checkpoint) -> Iterator[TensorSources]:
    """Yield the tensors of a checkpoint by name, without its files."""
    for name, entry in split_files(catalog.tensors(checkpoint))[0].items():
        ways: dict[str, int] = {}
        stored_bytes = 0
        for key, size in entry.chunks():
            how, length = _describe_storage(catalog, key, checkpoint.base)
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


def _describe_storage(catalog: Catalog, key: bytes, base: str | None) -> tuple[str, int]:
    stored = catalog.objects.find(key, base)
    if stored is None:
        in_base = catalog.objects.find_in_base(key, base) is not None
        return "equal to base" if in_base else "missing", 0
    record = stored.record
    codec = codecs.codec_by_code(record.codec)
    if not codec.needs_reference:
        return f"{codec.name}, no reference", record.length
    against = "base" if isinstance(record.reference, BaseSpan | ViewSpan) else "checkpoint"
    return f"{codec.name} against {against}", record.length


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Count the content of a store.

    Attributes:
        checkpoints: Number of checkpoints.
        logical_bytes: Bytes of all checkpoints as full copies.
        stored_bytes: Encoded bytes of all chunks in packs.
        held_bytes: Encoded bytes of chunks that no checkpoint names but that others refer to.
        manifest_bytes: Bytes of all manifests, a part of ``on_disk_bytes``.
        on_disk_bytes: Bytes of all files of the store, including temporary ones but not the bases.
        quarantine_bytes: Bytes of the files that repairs moved to quarantine, a part of
            ``on_disk_bytes``.
        base_bytes: Bytes of the tensors of all recorded bases.
        chunks: Number of distinct chunks that checkpoints name.
        shared_chunks: Number of those that several checkpoints name or that a base contains.
    """

    checkpoints: int
    logical_bytes: int
    stored_bytes: int
    held_bytes: int
    manifest_bytes: int
    on_disk_bytes: int
    quarantine_bytes: int
    base_bytes: int
    chunks: int
    shared_chunks: int


def encoded_bytes(catalog: Catalog, checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
    """Return the encoded bytes of the chunks of each existing checkpoint, by checkpoint id."""
    catalog.refresh()
    existing = [c for c in checkpoints if catalog.get(c.id) is not None]
    return {checkpoint.id: catalog.stored_bytes(checkpoint) for checkpoint in existing}


def stats(catalog: Catalog) -> Stats:
    """Refresh the catalog and count the content of the store."""
    catalog.refresh()
    checkpoints, objects = catalog.checkpoints(), catalog.objects
    index, keys = objects.index, catalog.keys_by_base(checkpoints)
    needs = find_reachable(objects, index, keys)
    uses = [unique_keys(catalog.keys(checkpoint)) for checkpoint in checkpoints]
    named, times = count_keys(concatenate_keys(uses))
    in_base = [some[objects.mask_in_base(some, base)] for base, some in keys.items()]
    shared = (times > 1) | is_among(named, concatenate_keys(in_base))
    return Stats(
        checkpoints=len(checkpoints),
        logical_bytes=sum(checkpoint.logical_bytes for checkpoint in checkpoints),
        stored_bytes=int(index.lengths.sum()),
        held_bytes=int(index.lengths[needs.only_referenced].sum()),
        manifest_bytes=sum(file_sizes(catalog.backend, MANIFESTS).values()),
        on_disk_bytes=disk_bytes(catalog.backend),
        quarantine_bytes=sum(file_sizes(catalog.backend, QUARANTINE).values()),
        base_bytes=sum(base.logical_bytes for base in objects.bases().values()),
        chunks=len(named),
        shared_chunks=int(shared.sum()),
    )
