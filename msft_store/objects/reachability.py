"""What checkpoints need: the closure of their chunks over references.

Example::

    needs = closure(objects, objects.index, {base.id: keys})
    needs.live[index_row]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msft_store.format.key_table import Keys, KeyTable, concatenate_keys, unique_keys, view_keys
from msft_store.objects.catalog import Catalog
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.packs import PackIndex


@dataclass(frozen=True, kw_only=True, eq=False)
class ReachableChunks:
    """What restoring chunks needs."""

    live: NDArray[np.bool_]
    """Which rows of the index."""
    only_referenced: NDArray[np.bool_]
    """Those that are needed only because others are differences of them."""
    missing: Keys
    """What is in no pack and in no base."""


def find_reachable(
    objects: ChunkStore, index: PackIndex, keys: Mapping[str | None, Keys]
) -> ReachableChunks:
    """Return what restoring chunks needs; ``keys`` are those of checkpoints, by their base."""
    live, missing = np.zeros(len(index), bool), [view_keys(b"")]
    pending, named = list(keys.items()), None
    while pending:
        fresh = np.zeros(len(index), bool)
        for base, wanted in pending:
            packed = wanted[~objects.mask_in_base(wanted, base)]
            rows = index.find_all(packed, base)
            missing.append(packed[rows < 0])
            fresh[rows[rows >= 0]] = True
        # What a row refers to depends on the row alone: once is enough.
        fresh &= ~live
        live |= fresh
        named = fresh if named is None else named
        pending = _referred(index, np.flatnonzero(fresh & index.refers_to_chunk))
    held = live if named is None else live & ~named
    return ReachableChunks(
        live=live,
        only_referenced=held & ~_stands(index, held, keys.values()),
        missing=unique_keys(concatenate_keys(missing)),
    )


def _stands(index: PackIndex, rows: NDArray[np.bool_], keys: Iterable[Keys]) -> NDArray[np.bool_]:
    """Return which of some rows have a key that stands among others."""
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
    """Return the keys that rows refer to, each with the base that it is looked up with."""
    found = []
    for number in np.unique(index.bases[rows]).tolist():
        here = rows[index.bases[rows] == number]
        whole = ~index.explicit[here]
        named = [key for row in here[~whole].tolist() for key in index.explicit_keys(row)]
        keys = concatenate_keys([index.ref_keys[here[whole]], view_keys(b"".join(named))])
        found.append((index.base_of(number), keys))
    return found


def own_bytes(catalog: Catalog, checkpoint: Checkpoint) -> int:
    """Return the encoded bytes that nothing would need if it were not for a checkpoint."""
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
