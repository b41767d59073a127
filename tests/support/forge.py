"""Forged packs and checkpoints that no save would write, with correct digests.

Example::

    (key,) = forge_pack(store, [(chunk(data, dtype), data)])
    forge_checkpoint(store, {"w": entry(dtype, (4,), key)})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msft_store import Checkpoint, Store
from msft_store.format.dtypes import DType
from msft_store.format.layout import Record, chunk_key
from msft_store.format.mapping import NOTHING
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import (
    CheckpointFacts,
    Piece,
    TensorEntry,
    checkpoint_content,
    tensor_table,
    write_manifest,
)
from msft_store.objects.packs import PackWriter
from msft_store.storage.backend import LocalBackend


def chunk(data: bytes, dtype: DType, **fields: Any) -> Record:
    """Return the record of a chunk; raw, without a reference, unless ``fields`` say otherwise."""
    plain = {"codec": 0, "depth": 0, "base": None, "offset": 0, "length": 0}
    key = chunk_key(data, dtype)
    return Record(**{**plain, "key": key, "size": len(data), "dtype": dtype.code, **fields})


def forge_pack(store: Store, chunks: Sequence[tuple[Record, bytes]]) -> list[bytes]:
    """Write a pack of records with their payloads; return the keys."""
    with LocalBackend(Path(store.path)).writer() as writer:
        pack = PackWriter(writer, store.version)
        for record, payload in chunks:
            place = {"offset": pack.position, "length": len(payload)}
            pack.append(dataclasses.replace(record, **place), payload)
        pack.finalize()
    return [record.key for record, _ in chunks]


def entry(dtype: DType, shape: tuple[int, ...], *keys: bytes) -> TensorEntry:
    """Return a tensor of one piece."""
    piece = Piece(offset=(0,) * len(shape), shape=shape, keys=keys)
    return TensorEntry(dtype=dtype, shape=shape, pieces=(piece,))


def forge_checkpoint(
    store: Store, tensors: Mapping[str, TensorEntry], base: str | None = None
) -> Checkpoint:
    """Write a manifest."""
    line = tensor_table(tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    content = checkpoint_content(
        CheckpointFacts.of(),
        parent=base,
        base=base,
        tensors=line,
        logical_bytes=size,
    )
    backend, found = LocalBackend(Path(store.path)), line
    if store.version > 1:
        found = Catalog(backend).tables.encode(line, base, NOTHING)
    return write_manifest(
        backend, content, found, created=1, stored_bytes=size, unreferenced_bytes=size
    )
