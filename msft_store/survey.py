"""What of a damaged store is sound: every chunk that a checkpoint needs is read.

Invariants: nothing is written. A record is blamed only after what it refers to was found sound. One
that is damaged, or whose reference is lost, is left out; then another representation of its chunk
serves, if there is one, and is read in its turn.

Example::

    found = survey(backend, Verdicts())
    found.sound, found.lost, found.packs
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from msft_store.backend import Backend
from msft_store.catalog import Catalog
from msft_store.errors import BaseError, CorruptedError, StorageError, StoreError, bare, reason
from msft_store.footer import Footer
from msft_store.format import MAX_DEPTH
from msft_store.keytable import Numbers, among
from msft_store.liveness import closure
from msft_store.objects import Objects
from msft_store.packs import Stored, read_pack
from msft_store.parallel import in_order
from msft_store.salvage import require_damage, salvage_footer

Row = tuple[str, int]
"""A record: the path of its pack, and its number there."""


class Verdicts:
    """What was found out about records. Packs never change, so a second survey is quick."""

    def __init__(self) -> None:
        self.damaged: dict[Row, str] = {}
        """Records whose payload is not what was written, and why."""
        self.mended: dict[str, str] = {}
        """What is wrong with packs that could be read all the same, by path."""
        self.sound: set[Row] = set()
        self._footers: dict[str, Footer] = {}

    def footer(self, backend: Backend, path: str) -> Footer:
        """Return all records of a pack, read in spite of damage where that is possible."""
        if path not in self._footers:
            try:
                self._footers[path] = read_pack(backend, path)
            except CorruptedError as error:
                self._footers[path] = salvage_footer(backend, path)
                self.mended[path] = reason(error)
        return self._footers[path]


class Survey:
    """One look at the chunks that checkpoints need."""

    def __init__(self, catalog: Catalog, verdicts: Verdicts) -> None:
        self.catalog = catalog
        """Which finds only what can be used."""
        self.verdicts = verdicts
        self.stranded: dict[Row, str] = {}
        """Records whose references are lost, and why."""
        self.waiting: dict[Row, str] = {}
        """Records that need a base which is not as it was, and why."""
        self.live: NDArray[np.bool_] = np.zeros(0, bool)
        """Which rows of the catalog's index checkpoints need."""
        self.places: list[Row] = []
        """Where each row of the catalog's index stands."""
        self.unreadable: dict[str, StoreError] = dict(catalog.damaged)
        """Checkpoints whose manifests cannot be read, and why, by id."""
        for checkpoint in catalog.checkpoints():
            try:
                catalog.tensors(checkpoint)
            except StoreError as error:
                self.unreadable[checkpoint.id] = bare(error)
        require_damage(self.unreadable.values())
        while not self._look():
            pass

    @cached_property
    def needed(self) -> set[Row]:
        """The records that checkpoints need."""
        return {self.places[row] for row in np.flatnonzero(self.live).tolist()}

    def numbers(self, path: str) -> Numbers:
        """Return the numbers of a pack's usable records."""
        count = len(self.verdicts.footer(self.catalog.backend, path))
        unusable = self.verdicts.damaged.keys() | self.stranded.keys()
        return np.array([n for n in range(count) if (path, n) not in unusable], np.int64)

    def needs_without(self, path: str) -> bool:
        """Return whether a chunk is needed of which a stranded record stands in a pack.

        That record would be taken for it.
        """
        here = [number for at, number in self.stranded if at == path]
        keys = self.verdicts.footer(self.catalog.backend, path).rows["key"][here]
        return bool(among(keys, self.catalog.objects.index.keys[self.live]).any())

    def can_serve(self, stored: Stored, place: Row) -> bool:
        """Return whether a record is sound, or cannot be judged before its base is back."""
        return place in self.verdicts.sound or self._judge(place, stored) is None

    def _look(self) -> bool:
        """Judge what is needed; return whether all of it can be used."""
        catalog = self.catalog
        catalog.objects = Objects(catalog.backend, self._usable)
        catalog.objects.refresh()
        require_damage(catalog.objects.damaged.values())
        known = catalog.objects.bases()
        named = catalog.keys_by_base(
            checkpoint
            for checkpoint in catalog.checkpoints()
            if checkpoint.id not in self.unreadable
            and (checkpoint.base is None or checkpoint.base in known)
        )
        index = catalog.objects.index
        self.live = closure(catalog.objects, index, named).live
        self.places = [
            (path, int(number)) for path, _ in index.slices() for number in self.numbers(path)
        ]
        before = len(self.verdicts.damaged) + len(self.stranded)
        for depth in range(MAX_DEPTH + 1):
            rows = np.flatnonzero(self.live & (index.depths == depth)).tolist()
            work = ((self.places[row], index.stored(row)) for row in rows)
            with closing(in_order(lambda item: self._judge(*item), work)) as verdicts:
                for _ in verdicts:
                    pass
            if len(self.verdicts.damaged) + len(self.stranded) > before:
                # Deeper ones may refer to what cannot be used, and must not be blamed for it.
                return False
        return True

    def _usable(self, backend: Backend, path: str) -> Footer:
        footer, rows = self.verdicts.footer(backend, path), self.numbers(path)
        if len(rows) == len(footer):
            return footer
        return replace(footer, rows=footer.rows[rows], refers_to_chunk=footer.refers_to_chunk[rows])

    def _judge(self, place: Row, stored: Stored) -> str | None:
        """Read a record, unless that was done; return why it cannot be used."""
        objects, base = self.catalog.objects, stored.record.base
        if base is not None and base not in objects.bases():
            self.waiting[place] = f"base {base[:12]} has no record that can be read"
            return None
        if not objects.is_whole(stored.record):
            self.stranded[place] = "what it refers to is lost"
            return self.stranded[place]
        if place not in self.verdicts.sound:
            try:
                objects.verify(stored)
                self.verdicts.sound.add(place)
            except BaseError as error:
                self.waiting[place] = reason(error)
            except StorageError as error:
                return self._blame(place, stored, error)
            except StoreError as error:
                require_damage([error])
                self.verdicts.damaged[place] = reason(error)
        return self.verdicts.damaged.get(place)

    def _blame(self, place: Row, stored: Stored, error: StorageError) -> str | None:
        """Tell a pack that cannot be read from a base that cannot."""
        try:
            self.catalog.backend.read(stored.pack, stored.record.offset, stored.record.length)
        except StorageError as own:
            require_damage([own])
            self.verdicts.damaged[place] = reason(own)
            return reason(own)
        self.waiting[place] = reason(error)
        return None
