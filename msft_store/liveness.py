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

from msft_store.keytable import Keys, among, as_keys, concatenate, unique
from msft_store.objects import Objects
from msft_store.packs import Index


@dataclass(frozen=True, kw_only=True, eq=False)
class Needs:
    """What restoring chunks needs."""

    live: NDArray[np.bool_]
    """Which rows of the index."""
    missing: Keys
    """What is in no pack and in no base."""


def closure(objects: Objects, index: Index, keys: Mapping[str | None, Keys]) -> Needs:
    """Return what restoring chunks needs; ``keys`` are those of checkpoints, by their base."""
    live = np.zeros(len(index), bool)
    missing: list[Keys] = []
    seen: dict[str | None, Keys] = {}
    pending = [(base, unique(some)) for base, some in keys.items()]
    while pending:
        base, wanted = pending.pop()
        known = seen.get(base, as_keys(b""))
        wanted = wanted[~among(wanted, known) & ~objects.in_base_all(wanted, base)]
        seen[base] = unique(concatenate([known, wanted]))
        rows = index.find_all(wanted, base)
        missing.append(wanted[rows < 0])
        rows = rows[rows >= 0]
        live[rows] = True
        pending += _referred(index, rows[index.refers_to_chunk[rows]])
    return Needs(live=live, missing=concatenate(missing))


def held_bytes(index: Index, needs: Needs, named: Iterable[Keys]) -> int:
    """Return the encoded bytes of what is needed, though it is not among the keys ``named``."""
    rows = np.flatnonzero(needs.live)
    return int(index.lengths[rows[~among(index.keys[rows], concatenate([*named]))]].sum())


def _referred(index: Index, rows: NDArray[np.int64]) -> list[tuple[str | None, Keys]]:
    """Return the keys that rows refer to, each with the base that it is looked up with."""
    found = []
    for number in np.unique(index.bases[rows]).tolist():
        here = rows[index.bases[rows] == number]
        whole = ~index.explicit[here]
        named = [key for row in here[~whole].tolist() for key in index.explicit_keys(row)]
        keys = concatenate([index.ref_keys[here[whole]], as_keys(b"".join(named))])
        found.append((index.base_of(number), unique(keys)))
    return found
