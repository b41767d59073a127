"""Find all chunks that checkpoints need, directly or as references.

Example::

    reachable = find_reachable(objects, objects.index, {base.id: keys})
    reachable.live[index_row]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msft_store.format.key_table import (
    Keys,
    KeyTable,
    concatenate_keys,
    is_among,
    key_at,
    unique_keys,
    view_keys,
)
from msft_store.objects.catalog import Catalog
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.packs import PackIndex


@dataclass(frozen=True, kw_only=True, eq=False)
class ReachableChunks:
    """The rows of an index that are needed to restore chunks.

    Attributes:
        live: Mask of the needed rows.
        only_referenced: Mask of the rows that are needed only as references of others.
        missing: Keys of needed chunks that are in no pack and in no base.
    """

    live: NDArray[np.bool_]
    only_referenced: NDArray[np.bool_]
    missing: Keys


def find_reachable(
    objects: ChunkStore, index: PackIndex, keys: Mapping[str | None, Keys]
) -> ReachableChunks:
    """Find the rows needed to restore chunks; ``keys`` are grouped by their checkpoints' base."""
    live, missing = np.zeros(len(index), bool), [view_keys(b"")]
    pending, named = list(keys.items()), None
    while pending:
        fresh = np.zeros(len(index), bool)
        for base, needed in pending:
            rows, lost = objects.find_needed(index, needed, base)
            missing.append(lost)
            fresh[rows] = True
        # Follow each row only once, because its references depend on the row alone.
        fresh &= ~live
        live |= fresh
        named = fresh if named is None else named
        pending = _referred(index, np.flatnonzero(fresh & index.refers_to_chunk))
    referenced = live if named is None else live & ~named
    return ReachableChunks(
        live=live,
        only_referenced=referenced & ~_mask_named(index, referenced, keys.values()),
        missing=unique_keys(concatenate_keys(missing)),
    )


def _mask_named(
    index: PackIndex, rows: NDArray[np.bool_], keys: Iterable[Keys]
) -> NDArray[np.bool_]:
    """Return a mask of those ``rows`` whose key is among ``keys``."""
    found, places = np.zeros(len(index), bool), np.flatnonzero(rows)
    if places.size:
        distinct = unique_keys(index.keys[places])
        table = KeyTable(distinct, np.arange(len(distinct)))
        named = np.zeros(len(distinct) + 1, bool)
        for some in keys:
            named[table.find(some)] = True
        found[places] = named[table.find(index.keys[places])]
    return found


def _referred(index: PackIndex, rows: NDArray[np.int64]) -> list[tuple[str | None, Keys]]:
    """Return the keys that rows refer to, grouped by the base to look them up with."""
    found = []
    for number in np.unique(index.bases[rows]).tolist():
        here = rows[index.bases[rows] == number]
        implicit = ~index.explicit[here]
        named = [key for row in here[~implicit].tolist() for key in index.explicit_keys(row)]
        keys = concatenate_keys([index.ref_keys[here[implicit]], view_keys(b"".join(named))])
        found.append((index.base_of(number), keys))
    return found


@dataclass(frozen=True, kw_only=True)
class Dependents:
    """Checkpoints that refer to chunks that no checkpoint names.

    Attributes:
        checkpoints: Those that refer to them directly, in the order in which they were given.
        held: Keys of these chunks.
        held_bytes: Encoded bytes of these chunks.
    """

    checkpoints: tuple[Checkpoint, ...]
    held: frozenset[bytes]
    held_bytes: int


def find_dependents(catalog: Catalog, checkpoints: Sequence[Checkpoint]) -> list[Dependents]:
    """Group checkpoints by the chunks that they hold and that no other checkpoint needs."""
    objects, index = catalog.objects, catalog.objects.index
    given = {checkpoint.id for checkpoint in checkpoints}
    everything = catalog.keys_by_base(catalog.checkpoints())
    free = find_reachable(objects, index, everything).only_referenced
    if not free.any():
        return []
    others = [other for other in catalog.checkpoints() if other.id not in given]
    free = free & ~find_reachable(objects, index, catalog.keys_by_base(others)).live
    groups: list[tuple[list[Checkpoint], NDArray[np.bool_]]] = []
    for checkpoint in checkpoints:
        needs = find_reachable(objects, index, catalog.keys_by_base([checkpoint])).live & free
        rows, _ = objects.find_needed(index, catalog.keys(checkpoint), checkpoint.base)
        referring = _referred(index, rows[index.refers_to_chunk[rows]])
        keys = concatenate_keys([keys for _, keys in referring])
        if not is_among(keys, index.keys[needs]).any():
            continue
        touching = [group for group in groups if (group[1] & needs).any()]
        groups = [group for group in groups if not (group[1] & needs).any()]
        members = [one for group in touching for one in group[0]]
        groups.append(([*members, checkpoint], np.any([needs, *(g[1] for g in touching)], axis=0)))
    return [
        Dependents(
            checkpoints=tuple(members),
            held=frozenset(key_at(index.keys, row) for row in np.flatnonzero(mask).tolist()),
            held_bytes=int(index.lengths[mask].sum()),
        )
        for members, mask in groups
    ]


def own_bytes(catalog: Catalog, checkpoint: Checkpoint) -> int:
    """Return the encoded bytes that only this checkpoint needs."""
    index, known = catalog.objects.index, catalog.checkpoints()
    others = [other for other in known if other.id != checkpoint.id]
    needed, rest = (
        int(
            index.lengths[
                find_reachable(catalog.objects, index, catalog.keys_by_base(some)).live
            ].sum()
        )
        for some in (known, others)
    )
    return needed - rest
