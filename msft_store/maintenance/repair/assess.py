"""Assess a damaged store: read every chunk that a checkpoint needs, and list the usable ones.

Invariants: nothing is written. A record counts as damaged only after its references were found
sound. A record that is damaged, or whose reference is lost, is ignored; another representation of
its chunk is then read instead, if there is one.

Example::

    sound, waiting, lost = Survey(catalog, Verdicts()).conditions()
    print(lost[0].checkpoint, lost[0].reasons)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from msft_store.errors import (
    BaseError,
    CorruptedError,
    StorageError,
    StoreError,
    require_damage,
    strip_frames,
    strip_hint,
)
from msft_store.format.dtypes import DType
from msft_store.format.key_table import Numbers, is_among
from msft_store.format.layout import MAX_DEPTH, NEWEST, Record
from msft_store.format.pack_footer import Footer
from msft_store.maintenance.check import Known, list_problems
from msft_store.maintenance.repair.extract import extract_footer
from msft_store.objects.catalog import Catalog
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.packs import StoredChunk, list_packs, pack_path, raise_generation, read_pack
from msft_store.objects.reachability import find_reachable
from msft_store.pipeline.parallel import for_each
from msft_store.storage.backend import Backend

Row = tuple[str, int]
"""A record: the path of its pack, and its number there."""


_MAX_REASONS = 3
"""Largest number of reasons for a checkpoint; one damaged pack can cause a thousand."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A checkpoint that cannot be restored, and the reasons."""

    checkpoint: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.checkpoint[:12]}: {'; '.join(self.reasons)}"


@dataclass(frozen=True, kw_only=True)
class PackCondition:
    """A pack that is damaged or has the wrong name."""

    path: str
    why: str
    records: int
    """Number of its records; 0 if the footer cannot be read."""
    usable: tuple[Record, ...]
    """Records that are sound or cannot be verified until their base is back."""
    right_path: str
    """The path that its footer implies; its own path if the footer cannot be read."""
    damaged: bool = True
    """False if only its name is wrong."""


class Verdicts:
    """Known states of records. Packs never change, so a second survey can reuse them."""

    def __init__(self) -> None:
        self.damaged: dict[Row, str] = {}
        """Records with a damaged payload, and the reasons."""
        self.damaged_packs: dict[str, str] = {}
        """Errors of damaged packs whose footers could be read, by path."""
        self.sound: set[Row] = set()
        self._footers: dict[str, Footer] = {}

    def footer(self, backend: Backend, path: str) -> Footer:
        """Return the footer of a pack, also if its header or trailer is damaged."""
        if path not in self._footers:
            try:
                self._footers[path] = read_pack(backend, path)
            except CorruptedError as error:
                footer = extract_footer(backend, path)
                if footer is None:
                    raise
                self._footers[path] = footer
                self.damaged_packs[path] = strip_hint(error)
        return self._footers[path]


class Survey:
    """The state of all chunks that checkpoints need."""

    def __init__(self, catalog: Catalog, verdicts: Verdicts) -> None:
        self.catalog = catalog
        """A catalog that finds only usable records."""
        self.verdicts = verdicts
        self.dangling: dict[Row, str] = {}
        """Records whose references are lost, and the reasons."""
        self.waiting: dict[Row, str] = {}
        """Records that need a missing or changed base, and the reasons."""
        self.live: NDArray[np.bool_] = np.zeros(0, bool)
        """Mask of the rows of the catalog's index that checkpoints need."""
        self.places: list[Row] = []
        """The record of each row of the catalog's index."""
        self.unreadable: dict[str, StoreError] = dict(catalog.damaged)
        """Errors of checkpoints whose manifests cannot be read, by id."""
        for checkpoint in catalog.checkpoints():
            try:
                # A checkpoint whose base has no record waits for it.
                with contextlib.suppress(BaseError):
                    catalog.tensors(checkpoint)
            except StoreError as error:
                self.unreadable[checkpoint.id] = strip_frames(error)
        require_damage(self.unreadable.values())
        self._known: Known = {}
        while not self._verify_needed():
            pass

    @cached_property
    def _needed(self) -> set[Row]:
        return {self.places[row] for row in np.flatnonzero(self.live).tolist()}

    def numbers(self, path: str) -> Numbers:
        """Return the numbers of a pack's usable records."""
        count = len(self.verdicts.footer(self.catalog.backend, path))
        unusable = self.verdicts.damaged.keys() | self.dangling.keys()
        return np.array([n for n in range(count) if (path, n) not in unusable], np.int64)

    def has_needed_dangling_record(self, path: str) -> bool:
        """Return True if a pack has a dangling record of a chunk that a checkpoint needs.

        A reader would use that record for the chunk, so the pack must go.
        """
        here = [number for pack, number in self.dangling if pack == path]
        keys = self.verdicts.footer(self.catalog.backend, path).rows["key"][here]
        return bool(is_among(keys, self.catalog.objects.index.keys[self.live]).any())

    def _verify_needed(self) -> bool:
        """Verify the needed records; return True if no new one turned out to be unusable."""
        catalog = self.catalog
        catalog.objects = ChunkStore(catalog.backend, self._usable)
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
        self.live = find_reachable(catalog.objects, index, named).live
        self.places = [
            (path, int(number)) for path, _ in index.slices() for number in self.numbers(path)
        ]
        before = len(self.verdicts.damaged) + len(self.dangling)
        for depth in range(MAX_DEPTH[NEWEST] + 1):
            rows = np.flatnonzero(self.live & (index.depths == depth)).tolist()
            work = ((self.places[row], index.stored(row)) for row in rows)
            for_each(lambda item: self._judge(*item), work)
            if len(self.verdicts.damaged) + len(self.dangling) > before:
                # Deeper records may refer to these and must not count as damaged for that reason.
                return False
        return True

    def _usable(self, backend: Backend, path: str) -> Footer:
        footer, rows = self.verdicts.footer(backend, path), self.numbers(path)
        if len(rows) == len(footer):
            return footer
        return replace(footer, rows=footer.rows[rows], refers_to_chunk=footer.refers_to_chunk[rows])

    def _judge(self, place: Row, stored: StoredChunk) -> str | None:
        """Verify a record once; return the reason why it is unusable, or ``None``."""
        objects, base = self.catalog.objects, stored.record.base
        if base is not None and base not in objects.bases():
            self.waiting[place] = f"base {base[:12]} has no record that can be read"
            return None
        if not objects.has_all_references(stored.record):
            self.dangling[place] = "its reference is lost"
            return self.dangling[place]
        if place not in self.verdicts.sound:
            try:
                objects.verify(stored)
                self.verdicts.sound.add(place)
            except BaseError as error:
                self.waiting[place] = strip_hint(error)
            except StorageError as error:
                return self._blame(place, stored, error)
            except StoreError as error:
                require_damage([error])
                self.verdicts.damaged[place] = strip_hint(error)
        return self.verdicts.damaged.get(place)

    def _blame(self, place: Row, stored: StoredChunk, error: StorageError) -> str | None:
        """Attribute a read error to the pack of a record, or else to its base."""
        try:
            self.catalog.backend.read(stored.pack, stored.record.offset, stored.record.length)
        except StorageError as own:
            require_damage([own])
            self.verdicts.damaged[place] = strip_hint(own)
            return strip_hint(own)
        self.waiting[place] = strip_hint(error)
        return None

    def conditions(self) -> tuple[list[str], list[Condition], list[Condition]]:
        """Return the ids of the sound checkpoints, and those that wait for a base or are lost."""
        sound: list[str] = []
        waiting: list[Condition] = []
        lost = [
            Condition(checkpoint=identity, reasons=(strip_hint(error),))
            for identity, error in self.unreadable.items()
        ]
        for checkpoint in self.catalog.checkpoints():
            if checkpoint.id in self.unreadable:
                continue
            problems = self._problems(checkpoint)
            fatal = [error for error in problems if not isinstance(error, BaseError)]
            if problems:
                texts = tuple(dict.fromkeys(map(str, fatal or problems)))[:_MAX_REASONS]
                condition = Condition(checkpoint=checkpoint.id, reasons=texts)
                (lost if fatal else waiting).append(condition)
            else:
                sound.append(checkpoint.id)
        return sound, waiting, lost

    @cached_property
    def _reasons(self) -> dict[bytes, str]:
        """The reasons why records are unusable, by the key of their chunk."""
        backend, verdicts = self.catalog.backend, self.verdicts
        return {
            verdicts.footer(backend, path).rows["key"][number].tobytes(): why
            for places in (self.dangling, verdicts.damaged)
            for (path, number), why in places.items()
        }

    def _problems(self, checkpoint: Checkpoint) -> list[StoreError]:
        base = checkpoint.base
        if base is not None and base not in self.catalog.objects.bases():
            # The checkpoint is not lost: adding the same model again restores the same base.
            text = f"base {base[:12]} has no record that can be read; msft-store add-base PATH"
            return [BaseError(f"{text} with the same model brings it back")]
        tensors = self.catalog.tensors(checkpoint)
        found = list_problems(tensors, base, self._known, self._assess_chunk)
        return [type(problem)(f"tensor {name}: {problem}") for name, problem in found]

    def _assess_chunk(
        self, key: bytes, size: int, dtype: DType, base: str | None
    ) -> StoreError | None:
        objects = self.catalog.objects
        if objects.find_in_base(key, base) is not None:
            try:
                objects.read(key, size, dtype, base)
            except StoreError as error:
                return BaseError(strip_hint(error))
            return None
        row = objects.index.find(key, base)
        if row < 0:
            return CorruptedError(self._reasons.get(key, f"chunk {key.hex()} is in no pack"))
        record = objects.index.stored(row).record
        if (record.size, record.dtype) != (size, dtype.code):
            return CorruptedError(f"chunk {key.hex()} has another size or dtype")
        waiting = self.waiting.get(self.places[row])
        return None if waiting is None else BaseError(waiting)

    def packs(self) -> Iterator[PackCondition]:
        """Yield the packs that are damaged or have the wrong name."""
        backend, verdicts = self.catalog.backend, self.verdicts
        unreadable = self.catalog.objects.damaged
        for path in list_packs(backend):
            if path in unreadable:
                why = strip_hint(unreadable[path])
                yield PackCondition(path=path, why=why, records=0, usable=(), right_path=path)
                continue
            footer = verdicts.footer(backend, path)
            reasons = [why for (at, _), why in verdicts.damaged.items() if at == path]
            if path in verdicts.damaged_packs:
                reasons.append(verdicts.damaged_packs[path])
            if self.has_needed_dangling_record(path):
                reasons.append("it has chunks whose references are lost")
            right = pack_path(footer.check)
            if reasons or path != right:
                yield PackCondition(
                    path=path,
                    why=reasons[0]
                    if reasons
                    else "its name is not the one that its content implies",
                    records=len(footer),
                    usable=tuple(self._usable_records(path, footer)) if reasons else (),
                    right_path=right,
                    damaged=bool(reasons),
                )

    def _usable_records(self, path: str, footer: Footer) -> list[Record]:
        """Return the records that are sound or cannot be verified until their base is back."""
        found = [(number, footer.record(number)) for number in self.numbers(path).tolist()]
        usable = [
            (number, record)
            for number, record in found
            if (path, number) in self.verdicts.sound
            or self._judge((path, number), StoredChunk(pack=path, record=record)) is None
        ]
        if len(usable) == len(footer):
            # Unchanged records give a new pack with the same content and name.
            return [record for _, record in usable]
        needed = self._needed
        return [raise_generation(record) if (path, n) in needed else record for n, record in usable]
